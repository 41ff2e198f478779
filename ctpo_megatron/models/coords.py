"""A trainer rank's place among the others: it decides which data the rank works on, and which part of the model it holds."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.models.tensors import HfTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoords:
    """Ranks and sizes along the axes of parallelism; the default is a rank that is alone."""

    dp_rank: int = 0
    cp_rank: int = 0
    cp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    expert_layers: tuple[int, ...] = ()
    """Places among the model's layers with experts of those that the rank holds, in the order of its chunks."""

    def share(self, tensor: HfTensor) -> tuple[int, int]:
        """Rank and size of the group that cuts `tensor`."""
        return (self.tp_rank, self.tp_size) if tensor.expert is None else (self.etp_rank, self.etp_size)
