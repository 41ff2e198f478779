"""How fast servers and trainer are: the numbers that a simulation is made from, measured in a run or computed from a roofline."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerSpeed:
    """One server. A decoding step gives every running request one token; a batch of prompts stops decoding while it is read.

    Seconds of a decoding step of n requests with `tokens` in their caches: the larger of
        step_s + request_s * n + token_s * tokens       (what is launched and read)
        compute_s * n                                   (what is multiplied)
    """

    step_s: float
    request_s: float = 0.0
    token_s: float = 0.0
    compute_s: float = 0.0
    prefill_s: float = 0.0  # of each batch of prompts
    prefill_token_s: float = 0.0  # and of each token in it that is not cached
    cache_tokens: int = 1 << 62  # that fit into its KV cache
    max_running: int = 4096  # requests that are decoded at a time
    max_prefill_tokens: int = 16384  # of one batch of prompts
    gather_s: float = 0.0  # for which an idle server waits for more requests before it reads the first

    def decode_s(self, steps: float, requests: int, tokens: float) -> float:
        """Returns the seconds of `steps` decoding steps of `requests`, which have `tokens` in their caches at the first."""
        base, growth = self._rate(requests, tokens)
        return steps * base + growth * steps * steps / 2

    def steps_in(self, seconds: float, requests: int, tokens: float) -> float:
        """Returns how many decoding steps of `requests` are done in `seconds`: the inverse of `decode_s`."""
        base, growth = self._rate(requests, tokens)
        if growth * seconds < 1e-9 * base * base:
            return seconds / base
        return (math.sqrt(base * base + 2 * growth * seconds) - base) / growth

    def _rate(self, requests: int, tokens: float) -> tuple[float, float]:
        """Seconds of the next step, and by how much each one after it is longer: caches grow by a token each."""
        read, multiplied = self.step_s + self.request_s * requests + self.token_s * tokens, self.compute_s * requests
        return (read, self.token_s * requests) if read >= multiplied else (multiplied, 0.0)


@dataclass(frozen=True, slots=True)
class TrainerSpeed:
    """The trainer in its layout: an optimizer step takes as long as the slowest data-parallel rank does for its micro-batches.

    A sample of L tokens costs `token_s * (L + attention * L^2)`.
    """

    token_s: float  # of one token on one data-parallel rank: forward, backward, and the old policy's forward where one is made
    attention: float = 0.0  # `planning.flops.attention_weight`
    micro_batch_s: float = 0.0  # of each micro-batch besides
    optimizer_s: float = 0.0  # of each optimizer step besides
    step_s: float = 0.0  # of each training step besides


@dataclass(frozen=True, slots=True)
class Speeds:
    """Everything that takes time. `cores`: of a host that servers, trainer and tools share; None: each has devices of its own."""

    server: ServerSpeed
    trainer: TrainerSpeed
    publish_s: float = 0.0  # for which a publication holds the trainer up
    paused_s: float = 0.0  # of these, for which servers do not sample
    tool_s: float = 0.0  # of one call
    tool_slots: int = 1 << 30  # calls at a time
    start_s: float = 120.0  # until a server that was lost is up again
    cores: float | None = None
    trainer_cores: float = 1.0  # that the trainer keeps busy
    source: str = ""  # where the numbers are from

    def as_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        return asdict(self)
