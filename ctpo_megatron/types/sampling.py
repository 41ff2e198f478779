"""What an inference engine samples: streams of tokens, and what is recorded of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """How a mixture-of-experts model routes: what a record of its choices looks like."""

    num_layers: int  # all of the model
    expert_layers: tuple[int, ...]  # those with experts, numbered from 0
    experts: int  # of each such layer
    top_k: int  # that a token goes to

    @property
    def dtype(self) -> np.dtype:
        """Returns the smallest signed integer that holds -1 and every expert's number."""
        return np.dtype(np.int8 if self.experts <= 128 else np.int16)

    def unknown(self, tokens: int) -> NDArray[np.signedinteger]:
        """Returns a record of `tokens` tokens about which nothing is known: -1, [tokens, expert layers, top_k]."""
        return np.full((tokens, len(self.expert_layers), self.top_k), -1, self.dtype)


@dataclass(frozen=True, slots=True)
class Truncation:
    """What is cut off the tempered distribution before a token is drawn. The defaults cut off nothing."""

    top_p: float = 1.0  # the likeliest tokens that together reach this probability
    top_k: int | None = None  # so many of the likeliest tokens; None: all
    min_p: float = 0.0  # tokens that are at least so many times as likely as the likeliest one

    @property
    def cuts(self) -> bool:
        """Returns whether anything can be cut off."""
        return self.top_p < 1.0 or self.top_k is not None or self.min_p > 0.0


WHOLE = Truncation()


@dataclass(frozen=True, slots=True)
class Supports:
    """The tokens that could have been drawn at each place of a stream, where sampling was truncated (docs/truncation.md)."""

    ids: NDArray[np.int32]  # [sum of counts], place after place
    counts: NDArray[np.int32]  # [tokens]; 0 where no policy drew

    @classmethod
    def none(cls, tokens: int) -> Supports:
        """Returns the entry of `tokens` tokens that no policy drew."""
        return cls(np.zeros(0, np.int32), np.zeros(tokens, np.int32))

    @classmethod
    def joined(cls, parts: Sequence[Supports]) -> Supports:
        """Returns one stream after the other; at least one is needed."""
        return cls(np.concatenate([p.ids for p in parts]), np.concatenate([p.counts for p in parts]))

    @classmethod
    def of_rows(cls, rows: NDArray[np.int32]) -> Supports:
        """Returns those in `rows` [tokens, K], where -1 is an unused column."""
        used = rows >= 0
        return cls(rows[used].astype(np.int32), used.sum(1).astype(np.int32))

    def part(self, own: slice) -> Supports:
        """Returns those of the places `own`, a run of the stream."""
        begin, end, _ = own.indices(len(self.counts))
        first = int(self.counts[:begin].sum())
        return Supports(self.ids[first : first + int(self.counts[begin:end].sum())], self.counts[begin:end])

    @property
    def width(self) -> int:
        """Returns the largest count, at least 1."""
        return max(1, int(self.counts.max(initial=0)))

    def rows(self, width: int) -> NDArray[np.int32]:
        """Returns [tokens, width]; -1: an unused column."""
        rows = np.full((len(self.counts), width), -1, np.int32)
        rows[np.arange(width) < self.counts[:, None]] = self.ids
        return rows


@dataclass(frozen=True, slots=True)
class TopK:
    """The top-k next tokens under the policy that sampled, most probable first, for each token of a stream."""

    ids: NDArray[np.int32]  # [tokens, K]
    logp: NDArray[np.float32]  # [tokens, K], at the sampling temperature; -inf: an unused place

    @classmethod
    def unused(cls, tokens: int, k: int) -> TopK:
        """Returns the entry of `tokens` tokens that no policy sampled: every place unused."""
        return cls(np.zeros((tokens, k), np.int32), np.full((tokens, k), -np.inf, np.float32))

    @classmethod
    def joined(cls, parts: list[TopK]) -> TopK:
        """Returns one stream after the other; at least one is needed."""
        return cls(np.concatenate([p.ids for p in parts]), np.concatenate([p.logp for p in parts]))


@dataclass(slots=True)
class Generation:
    """What an inference engine sampled after a prompt: streams of equal length. A stop token that ended it is the last entry."""

    token_ids: list[int] = field(default_factory=list)
    # of the distribution at the sampling temperature (greedy: at 1); with supports, of what truncation left of it
    rollout_logp: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # policy version that sampled each token
    finish: Literal["stop", "length", "deadline", "abort"] = "length"  # abort: of a part, more is to come
    top_k: TopK | None = None  # the top-k tokens at each place, at the sampling temperature
    routed_experts: NDArray[np.signedinteger] | None = None  # [tokens, expert layers, top_k], see `EngineClient.generate`
    supports: Supports | None = None  # the tokens that could have been drawn, of truncated sampling for training

    def copy(self) -> Generation:
        """Returns it as it is now: what is appended to this one later does not show there."""
        streams = self.token_ids.copy(), self.rollout_logp.copy(), self.versions.copy()
        return Generation(*streams, self.finish, self.top_k, self.routed_experts, self.supports)

    def append(self, part: Generation) -> None:
        """Add the tokens of `part`."""
        self.token_ids += part.token_ids
        self.rollout_logp += part.rollout_logp
        self.versions += part.versions
        if part.supports is not None:
            self.supports = Supports.joined([self.supports or Supports.none(0), part.supports])
