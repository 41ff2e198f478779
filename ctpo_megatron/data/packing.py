"""Samples packed into micro-batches, balanced over data-parallel ranks.

Invariants, for dp ranks, cp context-parallel and tp tensor-parallel ranks:
- every rank gets the same number of micro-batches, and none is empty;
- every sample is in exactly one micro-batch, whole; which one is `balance`'s business;
- each sequence's length is a multiple of 2 * cp (of 1 without context parallelism), so that zigzag can cut it;
- a micro-batch's length T is at most max_tokens, and T / cp is a multiple of tp, so that sequence parallelism can cut it;
- padding follows the sequence it belongs to, continues its positions, and is masked out;
- where prompts are shared (see `sharing`), a prompt is a sequence of its own before the samples that it begins.

Padding is the share of positions, over all micro-batches, that hold no sample's token: what the multiples above ask for, and the
micro-batches of one position that ranks without samples get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ctpo_megatron.algorithms import sequence_weights
from ctpo_megatron.batch import MicroBatch, Replay, Sequences, TokenStreams, TrainBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import Aggregation, Constant
from ctpo_megatron.data.balance import plan_micro_batches, round_up
from ctpo_megatron.data.sharing import Family, alone, families, part
from ctpo_megatron.data.sparing import spared
from ctpo_megatron.types import Supports, TopK, TrainSample

NOBODY = -1  # the teacher of a sequence that has none
FILLER = TrainSample([0], [0], [False], [0.0], [-1], [0.0], group=-1)  # for ranks with fewer samples than micro-batches


def pack(
    samples: Sequence[TrainSample],
    *,
    dp: int,
    max_tokens: int,
    cp: int = 1,
    tp: int = 1,
    weights: Sequence[float] | None = None,
    first_id: int = 0,
    ids: Sequence[int] | None = None,
    multiple: int = 1,
    attention_weight: float = 0.0,
    share_from: int | None = None,
    token_multiple: int = 1,
) -> list[list[MicroBatch]]:
    """Micro-batches [dp][n] that hold all `samples`; see the module's invariants.

    `weights` are those of the samples in the loss, 1 by default; `ids` are their numbers, by default from `first_id` on. The
    number n is a multiple of `multiple`, and `attention_weight` says what is balanced; see `balance`. `max_tokens` bounds the
    whole micro-batch that one data-parallel rank's cp ranks share. `share_from`: neighbours of a group read a common beginning of
    at least so many tokens once, where they fit into one micro-batch; None: each reads its own. `token_multiple`: what the share
    of a rank in a micro-batch's positions is a multiple of. Raises ValueError where a single sample, padded, is longer than
    `max_tokens`.
    """
    step, unit = length_steps(cp, tp, token_multiple)
    capacity = max_tokens // unit * unit
    if capacity == 0:
        raise ValueError(f"max_tokens={max_tokens}; with cp={cp}, tp={tp} a micro-batch needs at least {unit}")
    lengths = [round_up(max(len(sample), 1), step) for sample in samples]
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(
                f"sample {index} has {len(samples[index])} tokens, {length} padded to a multiple of {step}; a micro-batch holds "
                f"{capacity} (max_tokens={max_tokens} in steps of {unit} for cp={cp}, tp={tp})"
            )
    weighted = [1.0] * len(samples) if weights is None else weights
    numbers = range(first_id, first_id + len(samples)) if ids is None else ids
    share = max([*lengths, sum(lengths) // dp])  # more at once would leave other ranks with nothing to do
    room = min(capacity, share)
    together = alone(samples) if share_from is None else families(samples, fewest=share_from, capacity=room, step=step)
    sizes = [family.positions(samples, step) for family in together]
    bins = plan_micro_batches(sizes, capacity=capacity, dp=dp, multiple=multiple, attention_weight=attention_weight)
    samples, filler = _alike(samples)
    width = max((sample.supports.width for sample in samples if sample.supports is not None), default=1)

    def micro_batch(chosen: Sequence[int]) -> MicroBatch:
        pieces: list[_Piece] = []
        for family in (together[number] for number in chosen):
            pieces += _pieces(family, samples, weighted, numbers, len(pieces))
        return _micro_batch(pieces or [_Piece(filler, counts=False)], step, unit, width)

    return [[micro_batch(chosen) for chosen in bins[rank]] for rank in range(dp)]


def build_train_batch(
    samples: Sequence[TrainSample],
    *,
    aggregation: Aggregation,
    parallel: ParallelConfig,
    max_tokens: int,
    first_id: int = 0,
    attention_weight: float = 0.0,
    spare_beyond: int | None = None,
    share_from: int | None = None,
    token_multiple: int = 1,
) -> TrainBatch:
    """One optimizer step over `samples`: packed, with each sequence's weight in the loss under `aggregation`.

    `max_tokens` is per rank, so a micro-batch that cp ranks share holds cp times as many. `first_id` is the number of the first
    sample, for error messages. `attention_weight` says what is balanced, `share_from` from how many common tokens on prompts
    are read once, and `token_multiple` how far is padded, as in `pack`. `spare_beyond`: samples without an advantage are left out
    as soon as so many tokens have a pass, see `sparing.spared`; None: they are not. Under interleaving the number of
    micro-batches is a multiple of pp, as megatron's schedule asks. Raises ValueError for samples without any token of the policy,
    and as `pack` does.
    """
    weights = _weights(samples, aggregation)
    left_out = [] if spare_beyond is None else spared(samples, spare_beyond)
    places = sorted(set(range(len(samples))) - set(left_out))
    micro_batches = pack(
        [samples[place] for place in places],
        dp=parallel.dp,
        max_tokens=max_tokens * parallel.cp,
        cp=parallel.cp,
        tp=parallel.tp,
        weights=[weights[place] for place in places],
        ids=[first_id + place for place in places],
        multiple=parallel.pp if parallel.vpp > 1 else 1,
        attention_weight=attention_weight,
        share_from=share_from,
        token_multiple=token_multiple,
    )
    return TrainBatch(micro_batches, {first_id + place: sum(samples[place].mask) for place in left_out})


def _weights(samples: Sequence[TrainSample], aggregation: Aggregation) -> list[float]:
    """The weight of a token in each of `samples`. Those of one attempt are one sequence: branches give an attempt no more weight.

    Raises ValueError for samples without any token of the policy.
    """
    numbers: dict[tuple[int, int], int] = {}  # of sequences
    sequence: list[int] = []
    for place, sample in enumerate(samples):
        key = (-1, place) if sample.attempt is None else (sample.group, sample.attempt)
        sequence.append(numbers.setdefault(key, len(numbers)))
    lengths, signs, groups = ([0] * len(numbers) for _ in range(3))
    for number, sample in zip(sequence, samples, strict=True):
        lengths[number] += sum(sample.mask)
        signs[number] += sum((a > 0) - (a < 0) for a in sample.advantages)
        groups[number] = sample.group
    if sum(lengths) == 0:
        raise ValueError(f"none of the {len(samples)} samples holds a token of the policy; there is nothing to train on")
    weights = sequence_weights(
        aggregation.type,
        torch.tensor(lengths),
        constant=aggregation.tokens if isinstance(aggregation, Constant) else 1.0,
        groups=torch.tensor(groups),
        signs=torch.tensor(signs),
    ).tolist()
    return [weights[number] for number in sequence]


def longest_sample(parallel: ParallelConfig, max_tokens: int) -> int:
    """Tokens of the longest sample that a micro-batch holds, of `max_tokens` on each rank."""
    step, unit = length_steps(parallel.cp, parallel.tp)
    return max_tokens * parallel.cp // unit * unit // step * step


def length_steps(cp: int, tp: int, token_multiple: int = 1) -> tuple[int, int]:
    """What a sequence's length and a micro-batch's length have to be multiples of; `token_multiple`: a rank's share of it."""
    step = 2 * cp if cp > 1 else 1
    return step, math.lcm(step, cp * tp * token_multiple)


def _alike(samples: Sequence[TrainSample]) -> tuple[Sequence[TrainSample], TrainSample]:
    """The samples and a filler, all with whatever streams one of them has: all micro-batches are of one kind."""
    filled = [*samples, FILLER]
    k = next((sample.top_k.ids.shape[1] for sample in samples if sample.top_k is not None), None)
    if k is not None:
        filled = [s if s.top_k is not None else replace(s, top_k=TopK.unused(len(s), k)) for s in filled]
    if any(sample.rewards is not None for sample in samples):
        filled = [s if s.rewards is not None else replace(s, rewards=[0.0] * len(s)) for s in filled]
    if any(sample.supports is not None for sample in samples):
        filled = [s if s.supports is not None else replace(s, supports=Supports.none(len(s))) for s in filled]
    taught = [sample for sample in samples if sample.teacher is not None]
    nothing_to_ask = bool(taught) and not any(any(sample.mask) for sample in taught)  # so no server has answered
    if nothing_to_ask or any(sample.teacher_logp is not None for sample in samples):
        filled = [s if s.teacher_logp is not None else replace(s, teacher_logp=_untold(s)) for s in filled]
    if taught:
        filled = [s if s.teacher is not None else replace(s, teacher=NOBODY) for s in filled]
    return filled[:-1], filled[-1]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sequence of a micro-batch: a sample with its weight and number, or what a family shares, or the rest of one of them."""

    sample: TrainSample
    weight: float = 0.0
    number: int = -1
    prefix: int = -1  # the sequence before it in the micro-batch that holds its beginning
    shared: int = 0  # tokens of that
    counts: bool = True  # False: a filler

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.sample) if self.counts else 0


def _pieces(
    family: Family, samples: Sequence[TrainSample], weights: Sequence[float], numbers: Sequence[int], place: int
) -> list[_Piece]:
    """The sequences of a family whose first one is number `place` of its micro-batch."""
    shared, first = family.shared, samples[family.members[0]]
    if not shared:
        return [_Piece(samples[i], weights[i], numbers[i]) for i in family.members]
    branches = [_Piece(part(samples[i], shared), weights[i], numbers[i], place, shared) for i in family.members]
    return [_Piece(part(first, 0, shared)), *branches]


def _untold(sample: TrainSample) -> list[float]:
    """NaN at the tokens of a sample whose teacher is still to be asked, in the trainer's ranks; zeros of one that has none."""
    return [0.0 if sample.teacher is None or not wrote else math.nan for wrote in sample.mask]


def _micro_batch(pieces: Sequence[_Piece], step: int, unit: int, width: int) -> MicroBatch:
    """One micro-batch; each sequence padded to `step`, the last one further until the total is a multiple of `unit`.

    `width`: columns for the samples' supports.
    """
    samples: list[TrainSample] = [piece.sample for piece in pieces]
    lengths = [round_up(max(len(sample), 1), step) for sample in samples]
    lengths[-1] += round_up(sum(lengths), unit) - sum(lengths)

    def stream(values: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> torch.Tensor:
        padded: list[float] = []
        for row, length in zip(values, lengths, strict=True):
            padded += row
            padded += [padding] * (length - len(row))
        return torch.tensor(padded, dtype=dtype)

    def rows(values: Sequence[np.ndarray | None], padding: float) -> torch.Tensor | None:
        """A stream with a row of numbers for each token; None where no sample has one, padding where some have none."""
        like = next((value for value in values if value is not None), None)
        if like is None:
            return None
        whole = np.full((sum(lengths), *like.shape[1:]), padding, like.dtype)
        for value, end, length in zip(values, np.cumsum(lengths), lengths, strict=True):
            if value is not None:
                whole[end - length : end - length + len(value)] = value
        return torch.from_numpy(whole)

    routed_experts = rows([s.routed_experts for s in samples], -1)
    teachers = [s.teacher for s in samples if s.teacher is not None]
    teacher_logp = [s.teacher_logp for s in samples if s.teacher_logp is not None]
    rewards = [s.rewards for s in samples if s.rewards is not None]  # of all of them or of none, see `_alike`
    return MicroBatch(
        TokenStreams(
            input_ids=stream([s.input_ids for s in samples], 0, torch.int64),
            labels=stream([s.labels for s in samples], 0, torch.int64),
            position_ids=torch.cat([torch.arange(p.shared, p.shared + n) for p, n in zip(pieces, lengths, strict=True)]),
            mask=stream([s.mask for s in samples], False, torch.bool),
            advantages=stream([s.advantages for s in samples], 0.0, torch.float32),
            rollout_logp=stream([s.rollout_logp for s in samples], 0.0, torch.float32),
            teacher_logp=stream(teacher_logp, 0.0, torch.float32) if teacher_logp else None,
            versions=stream([s.versions for s in samples], -1, torch.int32),
            restarts=stream([_version_starts(sample) for sample in samples], False, torch.bool),
            top_k_ids=rows([None if s.top_k is None else s.top_k.ids for s in samples], 0),
            top_k_logp=rows([None if s.top_k is None else s.top_k.logp for s in samples], -math.inf),
            support_ids=rows([None if s.supports is None else s.supports.rows(width) for s in samples], -1),
            rewards=stream(rewards, 0.0, torch.float32) if rewards else None,
        ),
        Sequences(
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            lengths=torch.tensor([piece.length for piece in pieces]),
            groups=torch.tensor([sample.group for sample in samples]),
            weights=torch.tensor([piece.weight for piece in pieces], dtype=torch.float64),
            ids=torch.tensor([piece.number for piece in pieces]),
            teachers=torch.tensor(teachers) if teachers else None,
            prefixes=torch.tensor([p.prefix for p in pieces]) if any(p.shared for p in pieces) else None,
        ),
        None if routed_experts is None else Replay(routed_experts),
    )


def _version_starts(sample: TrainSample) -> list[bool]:
    """True on the first token that each policy version wrote; what the policy did not write is skipped."""
    starts, last = [], None
    for wrote, version in zip(sample.mask, sample.versions, strict=True):
        starts.append(wrote and version != last)
        last = version if wrote else last
    return starts
