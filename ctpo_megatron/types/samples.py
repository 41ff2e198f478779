"""A trajectory as the trainer sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.types.sampling import Supports, TopK


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One trajectory, or a branch of one, as the trainer sees it: label-aligned streams of equal length L = tokens - 1.

    Position t predicts `labels[t]` from `input_ids[: t + 1]`. No stream is shifted after this point.

    Example: prompt `[7, 8]`, sampled `[5, 6]`, tool `[9]`, sampled `[4]` gives
        input_ids     7  8  5  6  9
        labels        8  5  6  9  4
        mask          0  1  1  0  1
    """

    input_ids: list[int]
    labels: list[int]
    mask: list[bool]  # True where the policy wrote the label
    rollout_logp: list[float]  # engine's log-prob of the label; 0.0 where masked
    versions: list[int]  # version that sampled the label; -1 where masked
    advantages: list[float]  # 0.0 where masked, and everywhere until a critic has made them of rewards
    group: int = 0  # samples of one prompt share it
    attempt: int | None = None  # of its group; samples of one attempt weigh as one sequence. None: it is one by itself
    routed_experts: NDArray[np.signedinteger] | None = None  # [L, expert layers, top_k] of each input; -1: the trainer routes it
    top_k: TopK | None = None  # of each label, where the run collects it; unused where masked
    supports: Supports | None = None  # of each label, where sampling is truncated; none where masked
    teacher: int | None = None  # its place in `algorithm.distillation.teachers`; None: nobody teaches it
    teacher_logp: list[float] | None = None  # of the label by a teacher on a server; 0.0 where masked
    rewards: list[float] | None = None  # of each label, where a critic learns; 0.0 where masked

    def __post_init__(self) -> None:
        streams: list[Any] = [self.input_ids, self.labels, self.mask, self.rollout_logp, self.versions]
        streams += [self.advantages]
        streams += [] if self.routed_experts is None else [self.routed_experts]
        streams += [] if self.top_k is None else [self.top_k.ids, self.top_k.logp]
        streams += [] if self.supports is None else [self.supports.counts]
        streams += [] if self.teacher_logp is None else [self.teacher_logp]
        streams += [] if self.rewards is None else [self.rewards]
        if len({len(stream) for stream in streams}) != 1:
            raise ValueError(f"streams of a sample differ in length: {[len(stream) for stream in streams]}")

    def __len__(self) -> int:
        return len(self.input_ids)
