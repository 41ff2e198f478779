"""How busy servers are, by their own account, and the bound on what each is sent that follows from it.

SGLang 0.5.23 tells at /v1/loads, out of memory that its scheduler writes anyway: asking costs the scheduler nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.errors import EngineError

FULL = 0.9  # of a KV cache: SGLang takes generations back to its queue when it is used up
DECREASE = 0.8  # of what is in flight, where that was too much
START = 16  # requests at a server of which nothing is known yet


@dataclass(frozen=True, slots=True)
class Load:
    """What one server says of itself."""

    running: int  # requests in its batch
    waiting: int  # in its queue
    retracted: int  # that lost their KV cache since its last report, and are computed again
    cache_use: float  # share of its KV cache

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
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
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
