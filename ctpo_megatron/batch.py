"""What the trainer receives: micro-batches of packed sequences, with the weight of every sequence in the loss.

And what it gives back where it could not use them: an `Abandoned` update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.parallel.layout import own_experts, shard_indices
from ctpo_megatron.record.values import Values


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """What a micro-batch holds per token; context parallelism cuts every one of these streams. T positions, label-aligned."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence, or from the tokens on that it shares
    mask: Tensor  # [T] bool, True where the policy wrote the label
    advantages: Tensor  # [T] float32
    rollout_logp: Tensor  # [T] float32, 0 where masked
    versions: Tensor  # [T] int32, -1 where masked
    restarts: Tensor  # [T] bool, True on the first token of each policy version in a sequence
    anchor_logp: Tensor | None = None  # [T] float32, of the policy that ratios are taken against
    reference_logp: Tensor | None = None  # [T] float32, of the reference policy
    teacher_logp: Tensor | None = None  # [T] float32, of the sequence's teacher; NaN before it was asked, 0 where there is none
    top_k_ids: Tensor | None = None  # [T, K] int32, the top-k tokens of the policy that sampled
    top_k_logp: Tensor | None = None  # [T, K] float32, their log-probs under it; -inf: an unused place
    support_ids: Tensor | None = None  # [T, K] int32, what truncated sampling could have drawn; -1: an unused column
    policy_top_k_logp: Tensor | None = None  # [T, K] float32, those of the policy in training, found in its forward pass
    rewards: Tensor | None = None  # [T] float32, where a critic learns; 0 where masked
    old_values: Tensor | None = None  # [T] float32, the critic's before the update
    returns: Tensor | None = None  # [T] float32, what it is to learn of them
    values: Tensor | None = None  # [T] float32, those of the critic in training, found in the forward pass

    def at(self, index: Tensor) -> TokenStreams:
        """The positions `index` of every stream."""
        return _mapped(self, lambda stream: stream[index])


@dataclass(frozen=True, slots=True)
class Sequences:
    """What a micro-batch holds per sequence: of WHOLE sequences, also in a context-parallel shard."""

    cu_seqlens: Tensor  # [N+1] int32, their borders, padding included
    lengths: Tensor  # [N] int64, without padding
    groups: Tensor  # [N] int64, the prompt's group of each sequence
    weights: Tensor  # [N] float64, of each token of a sequence in the loss; all ranks' and micro-batches' make up the mean
    ids: Tensor  # [N] int64, place of each sequence among the samples of the rollout batch; -1 for padding and what is shared
    # [N] int64, of each sequence that sequence of the micro-batch whose tokens, without padding, come before its own; -1: none.
    # None: nothing is shared
    prefixes: Tensor | None = None
    teachers: Tensor | None = None  # [N] int64, place of each one's teacher among the run's; -1: nobody. None: there are none

    def to(self, device: torch.device) -> Sequences:
        """A copy on `device`."""
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"))

    def shared_lengths(self) -> Tensor:
        """[N] int64: how many tokens come before each sequence's own, in the sequence that it shares with others."""
        if self.prefixes is None:
            return torch.zeros_like(self.lengths)
        return torch.where(self.prefixes < 0, 0, self.lengths[self.prefixes.clamp(min=0)])


@dataclass(frozen=True, slots=True)
class Replay:
    """The routing that experts are to follow (docs/routing_replay.md): of a whole micro-batch, or one rank's part of it."""

    routed_experts: Tensor  # [T, expert layers, k], or the part of `owner`; -1: the trainer routes the token itself
    owner: RankCoords | None = None  # None: of the whole micro-batch

    def for_rank(self, coords: RankCoords, cu_seqlens: Tensor) -> Replay:
        """The part of the rank at `coords`; see `parallel.own_experts`. Raises ValueError for the part of another rank."""
        if self.owner == coords:
            return self
        if self.owner is not None:
            raise ValueError(f"the routing is that of the rank at {self.owner}; this one is at {coords}")
        return Replay(own_experts(self.routed_experts, cu_seqlens, coords), coords)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N sequences packed into T label-aligned positions; padding is masked out and belongs to the sequence before it.

    A context-parallel shard has T / cp positions of each stream, and everything that is said of whole sequences.
    """

    tokens: TokenStreams
    sequences: Sequences
    replay: Replay | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return self.sequences.cu_seqlens.numel() - 1

    @property
    def positions(self) -> int:
        """Positions in the whole micro-batch, padding included."""
        return int(self.sequences.cu_seqlens[-1])

    def counted(self, cp_size: int) -> Tensor:
        """[T / cp_size] bool, of a shard: False on padding."""
        each, position_ids = self.sequences.cu_seqlens.diff() // cp_size, self.tokens.position_ids
        ends = self.sequences.lengths + self.sequences.shared_lengths()
        return position_ids < ends.repeat_interleave(each, output_size=position_ids.numel())

    def shard(self, cp_rank: int, cp_size: int) -> MicroBatch:
        """This rank's zigzag part of every stream."""
        if cp_size == 1:
            return self
        return replace(self, tokens=self.tokens.at(shard_indices(self.sequences.cu_seqlens, cp_rank, cp_size)))

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        replay = None if self.replay is None else _mapped(self.replay, moved)
        return MicroBatch(_mapped(self.tokens, moved), _mapped(self.sequences, moved), replay)

    def with_streams(self, **streams: Tensor | None) -> MicroBatch:
        """A copy with these streams of `TokenStreams`, [T] or [T, K] or this shard's part of them, in place of its own."""
        changed: dict[str, Any] = dict(streams)
        return replace(self, tokens=replace(self.tokens, **changed))


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer step. Every data-parallel rank gets the same number of micro-batches.

    The loss is the sum over all ranks and micro-batches of weighted token losses: the weights, which say how the batch as a
    whole is averaged, are found before it is cut up.
    """

    micro_batches: list[list[MicroBatch]]  # [dp][n]
    spared: Mapping[int, int] = field(default_factory=dict)  # numbers of samples that need no pass: tokens that the policy wrote

    def ids(self) -> list[int]:
        """Numbers of its sequences in the rollout batch, in ascending order, without padding."""
        numbers = (int(each) for row in self.micro_batches for mb in row for each in mb.sequences.ids)
        return sorted(number for number in numbers if number >= 0)


AnchorStreams = dict[str, Tensor]
"""`anchor_logp`, `reference_logp` and, by teachers in its ranks, `teacher_logp` of a micro-batch, [T] or a shard of it: what the
trainer adds to it before the first optimizer step of an update."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """An update that ended at an optimizer step which was not applied: a loss, log-prob or gradient was not finite.

    Weights, moments and schedule are as they were before that step. The optimizer steps before it stay, those after it were not
    tried.
    """

    reason: str
    at: int | None  # the optimizer step of the update, from 0; None: seen before the first, in the old policy's log-probs
    sequence: int | None  # number of the first bad sequence in the rollout batch, where that is known
    values: Values  # statistics of the optimizer steps that were applied
    anchors: list[list[AnchorStreams]]  # [dp][n] of the step's micro-batches; from one rank [1][n], of its shards; or empty

    @property
    def applied(self) -> int:
        """Optimizer steps of the update that stay."""
        return self.at or 0

    def number(self, batches: list[TrainBatch]) -> int:
        """The optimizer step, from 0, of `batches` that holds the bad sequence; the first where that is not known."""
        if self.at is not None:
            return self.at
        holding = (n for n, batch in enumerate(batches) if self.sequence is not None and self.sequence in batch.ids())
        return next(holding, 0)


@dataclass(frozen=True, slots=True)
class KeptShard:
    """What an update made of the tokens of a micro-batch, or of a shard of it: [T] each (`record.token_files`)."""

    gap: Tensor  # float16
    log_ratio: Tensor  # float16
    fate: Tensor  # uint8


class UpdateAbandoned(NonFiniteError):
    """Carries an `Abandoned` update to whoever decides whether the run goes on."""

    def __init__(self, update: Abandoned) -> None:
        super().__init__(update.reason, sequence=update.sequence)
        self.update = update

    def __reduce__(self) -> tuple[type[UpdateAbandoned], tuple[Abandoned]]:
        return UpdateAbandoned, (self.update,)


_Part = TypeVar("_Part", TokenStreams, Sequences, Replay)


def _mapped(part: _Part, function: Any) -> _Part:
    """A copy of a part of a micro-batch with `function` of each tensor in it."""
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    changed: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(part, **changed)
