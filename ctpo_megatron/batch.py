"""What the trainer receives: packed micro-batches, with the weight of every sequence in the loss."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ctpo_megatron.parallel.layout import shard_indices


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N sequences packed into T label-aligned positions; padding is masked out and belongs to the sequence before it.

    `cu_seqlens` always describes the WHOLE sequences, also in a context-parallel shard, whose streams have T / cp positions.
    """

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    mask: Tensor  # [T] bool, True where the policy wrote the label
    advantages: Tensor  # [T] float32
    rollout_logp: Tensor  # [T] float32, 0 where masked
    versions: Tensor  # [T] int32, -1 where masked
    cu_seqlens: Tensor  # [N+1] int32
    lengths: Tensor  # [N] int64, of the sequences without padding
    groups: Tensor  # [N] int64, the prompt's group of each sequence
    weights: Tensor  # [N] float64, of each token of a sequence in the loss; all ranks' and micro-batches' make up the mean
    sequence_ids: Tensor  # [N] int64, place of each sequence among the samples of the rollout batch; -1 for padding
    restarts: Tensor  # [T] bool, True on the first token of each policy version in a sequence
    old_logp: Tensor | None = None  # [T] float32, of the trainer's policy before the first step on this batch
    reference_logp: Tensor | None = None  # [T] float32, of the reference policy
    support_ids: Tensor | None = None  # [T, K] int32, the likeliest tokens under the policy that sampled
    support_logp: Tensor | None = None  # [T, K] float32, their log-probs under it; -inf: an unused place
    policy_support_logp: Tensor | None = None  # [T, K] float32, those of the policy in training, found in its forward pass
    routed_experts: Tensor | None = None  # [T, expert layers, k], docs/routing_replay.md; -1: the trainer routes the token itself
    own_experts: Tensor | None = None  # what the routers of one rank see of that; see `parallel.own_experts`

    def __len__(self) -> int:
        """Number of sequences."""
        return self.cu_seqlens.numel() - 1

    @property
    def tokens(self) -> int:
        """Positions in the whole pack, padding included."""
        return int(self.cu_seqlens[-1])

    def counted(self, cp_size: int) -> Tensor:
        """[T / cp_size] bool, of a shard: False on padding."""
        each = self.cu_seqlens.diff() // cp_size
        return self.position_ids < self.lengths.repeat_interleave(each, output_size=self.position_ids.numel())

    def shard(self, cp_rank: int, cp_size: int) -> MicroBatch:
        """This rank's zigzag part of every stream."""
        if cp_size == 1:
            return self
        index = shard_indices(self.cu_seqlens, cp_rank, cp_size)
        cut = {name: stream[index] for name, stream in self._streams().items()}
        return replace(self, **cut)

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return MicroBatch(**{k: None if v is None else v.to(device, non_blocking=True) for k, v in tensors.items()})

    def with_anchor_logp(self, old_logp: Tensor) -> MicroBatch:
        """A copy that carries the old policy's log-probs [T] (or this shard's part of them)."""
        return replace(self, old_logp=old_logp)

    def with_reference_logp(self, reference_logp: Tensor) -> MicroBatch:
        """The same for the reference policy's log-probs."""
        return replace(self, reference_logp=reference_logp)

    def with_policy_support_logp(self, logp: Tensor | None) -> MicroBatch:
        """A copy that carries the policy's own log-probs [T, K] of the support."""
        return replace(self, policy_support_logp=logp)

    def _streams(self) -> dict[str, Tensor]:
        whole = {"cu_seqlens", "lengths", "groups", "weights", "sequence_ids", "own_experts"}
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in whole}
        return {name: stream for name, stream in named.items() if stream is not None}


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer step. Every data-parallel rank gets the same number of micro-batches.

    The loss is the sum over all ranks and micro-batches of weighted token losses: the weights, which say how the batch as a
    whole is averaged, are found before it is cut up.
    """

    micro_batches: list[list[MicroBatch]]  # [dp][n]
    sequences: int  # sequences that hold at least one token of the policy
    tokens: int  # tokens of the policy
