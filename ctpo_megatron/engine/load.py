"""How busy servers are, by their own account, and the bound on what each is sent that follows from it.

SGLang 0.5.23 tells at /v1/loads, out of memory that its scheduler writes anyway: asking costs the scheduler nothing.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.errors import EngineError

FULL = 0.9  # of a KV cache: SGLang takes generations back to its queue when it is used up
DECREASE = 0.8  # of what is in flight, where that was too much
SHOWN = 64  # servers whose numbers are recorded one by one
START = 16  # requests at a server of which nothing is known yet


@dataclass(frozen=True, slots=True)
class Load:
    """What one server says of itself."""

    running: int  # requests in its batch
    waiting: int  # in its queue
    retracted: int  # that lost their KV cache since its last report, and are computed again
    cache_use: float  # share of its KV cache
    throughput: float = 0.0  # tokens per second that it samples
    cache_hits: float = 0.0  # share of the prompts' tokens that were in its prefix cache

    @property
    def crowded(self) -> bool:
        """Returns whether it has more than it can work on at once."""
        return self.waiting > 0 or self.retracted > 0 or self.cache_use > FULL


def read_load(answer: Any, url: str) -> Load:
    """Returns what /v1/loads says, over all ranks of the server that have a queue. Raises EngineError for another form."""
    try:
        ranks = answer["loads"]
        return Load(
            running=sum(int(rank["num_running_reqs"]) for rank in ranks),
            waiting=sum(int(rank["num_waiting_reqs"]) for rank in ranks),
            retracted=sum(int((rank.get("queues") or {}).get("retracted", 0)) for rank in ranks),
            cache_use=max(_finite(rank["token_usage"]) for rank in ranks),
            throughput=sum(_finite(rank.get("gen_throughput", 0.0)) for rank in ranks),
            cache_hits=sum(_finite(rank.get("cache_hit_rate", 0.0)) for rank in ranks) / len(ranks),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise EngineError(f"{url}/v1/loads gave no loads: {str(answer)[:300]}") from error


def _finite(value: Any) -> float:
    if not math.isfinite(found := float(value)):
        raise ValueError(f"{value} is no number")
    return found


def next_limit(limit: int | None, in_flight: int, load: Load, most: int) -> int:
    """Returns the bound on requests at a server, with `in_flight` under way, after a look at its `load`; from 1 to `most`.

    Additive increase, multiplicative decrease: it grows by a twentieth, at least by 1, while it is reached and the server keeps
    up, and falls below what is in flight when the server is crowded. What is not reached says nothing, and stays.
    """
    limit = min(START if limit is None else limit, most)
    if load.crowded:
        return max(1, min(limit, int(in_flight * DECREASE)))
    if in_flight >= limit:
        limit += max(1, limit // 20)
    return min(limit, most)


class LoadsSeen:
    """What servers said since it was asked last, one by one, under the record's names."""

    def __init__(self) -> None:
        self._looks: dict[str, list[Load]] = {}

    def saw(self, server: str, load: Load) -> None:
        """Note what a server said. Its name ends with its number; of those from SHOWN on nothing is kept."""
        number = server.rpartition(" ")[2]
        if number.isdigit() and int(number) < SHOWN:
            self._looks.setdefault(number, []).append(load)

    def metrics(self) -> dict[str, float]:
        """Returns throughput and cache hits in the mean of looks, queue and use of the KV cache at their most."""
        looks, self._looks = self._looks, {}
        found = {}
        for number, loads in looks.items():
            found[f"servers/throughput/server_{number}"] = statistics.fmean(load.throughput for load in loads)
            found[f"servers/cache_hits/server_{number}"] = statistics.fmean(load.cache_hits for load in loads)
            found[f"servers/queue/server_{number}"] = float(max(load.waiting for load in loads))
            found[f"servers/kv_use/server_{number}"] = max(load.cache_use for load in loads)
        return found
