"""Samples packed into micro-batches, balanced over data-parallel ranks.

Invariants, for dp ranks, cp context-parallel and tp tensor-parallel ranks:
- every rank gets the same number of micro-batches, the smallest that the packer finds, and none is empty;
- every sample is in exactly one micro-batch, whole;
- each sequence's length is a multiple of 2 * cp (of 1 without context parallelism), so that zigzag can cut it;
- a pack's length T is at most max_tokens, and T / cp is a multiple of tp, so that sequence parallelism can cut it;
- padding follows the sequence it belongs to, continues its positions, and is masked out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from ctpo_megatron.algorithms import sequence_weights
from ctpo_megatron.batch import MicroBatch, TrainBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import Aggregation, Constant
from ctpo_megatron.types import TrainSample

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
) -> list[list[MicroBatch]]:
    """Micro-batches [dp][n] that hold all `samples`; see the module's invariants.

    `weights` are those of the samples in the loss, 1 by default; `first_id` is the number of the first sample.
    `max_tokens` bounds the whole pack that one data-parallel rank's cp ranks share. Raises ValueError where a single sample,
    padded, is longer than that.
    """
    step, unit = length_steps(cp, tp)
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
    bins = _balanced_bins(lengths, capacity, dp)

    def micro_batch(members: Sequence[int]) -> MicroBatch:
        chosen = [(samples[i], weighted[i], first_id + i) for i in members]
        return _micro_batch(chosen or [(FILLER, 0.0, -1)], step, unit)

    return [[micro_batch(members) for members in bins[rank]] for rank in range(dp)]


def build_train_batch(
    samples: Sequence[TrainSample],
    *,
    aggregation: Aggregation,
    parallel: ParallelConfig,
    max_tokens: int,
    first_id: int = 0,
) -> TrainBatch:
    """One optimizer step over `samples`: packed, with each sequence's weight in the loss under `aggregation`.

    `max_tokens` is per rank, so a pack that cp ranks share holds cp times as many. `first_id` is the number of the first sample,
    for error messages. Raises ValueError for samples without any token of the policy, and as `pack` does.
    """
    lengths = [sum(sample.loss_mask) for sample in samples]
    tokens, sequences = sum(lengths), sum(length > 0 for length in lengths)
    if tokens == 0:
        raise ValueError(f"none of the {len(samples)} samples holds a token of the policy; there is nothing to train on")
    weights = sequence_weights(
        aggregation.type,
        torch.tensor(lengths),
        constant=aggregation.tokens if isinstance(aggregation, Constant) else 1.0,
        groups=torch.tensor([sample.group for sample in samples]),
        signs=torch.tensor([sum((a > 0) - (a < 0) for a in sample.advantages) for sample in samples]),
    )
    micro_batches = pack(
        samples,
        dp=parallel.dp,
        max_tokens=max_tokens * parallel.cp,
        cp=parallel.cp,
        tp=parallel.tp,
        weights=weights.tolist(),
        first_id=first_id,
    )
    return TrainBatch(micro_batches, sequences, tokens)


def length_steps(cp: int, tp: int) -> tuple[int, int]:
    """What a sequence's length and a pack's length have to be multiples of."""
    step = 2 * cp if cp > 1 else 1
    return step, math.lcm(step, cp * tp)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _balanced_bins(lengths: Sequence[int], capacity: int, dp: int) -> list[list[list[int]]]:
    """Indices of samples as [dp][n][members]: the longest first, each into the emptiest bin (the LPT rule of scheduling)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = max(1, -(-sum(lengths) // (capacity * dp)))
    while (bins := _fill(lengths, order, capacity, count * dp)) is None:
        count += 1
    # neighbours in load become the n-th micro-batch of the ranks, so ranks wait little for one another
    bins.sort(key=lambda members: -sum(lengths[i] for i in members))
    return [[sorted(members) for members in bins[rank::dp]] for rank in range(dp)]


def _fill(lengths: Sequence[int], order: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """`count` bins of at most `capacity`, or None where the emptiest bin cannot take the next sample."""
    heap = [(0, number) for number in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        load, number = heap[0]
        if load + lengths[index] > capacity:
            return None
        bins[number].append(index)
        heapq.heapreplace(heap, (load + lengths[index], number))
    return bins


def _micro_batch(chosen: Sequence[tuple[TrainSample, float, int]], step: int, unit: int) -> MicroBatch:
    """One pack; each sequence padded to `step`, the last one further until the total is a multiple of `unit`.

    `chosen` holds samples with their weights and numbers.
    """
    samples, weights, ids = zip(*chosen, strict=True)
    lengths = [round_up(max(len(sample), 1), step) for sample in samples]
    lengths[-1] += round_up(sum(lengths), unit) - sum(lengths)

    def stream(values: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> torch.Tensor:
        padded: list[float] = []
        for row, length in zip(values, lengths, strict=True):
            padded += row
            padded += [padding] * (length - len(row))
        return torch.tensor(padded, dtype=dtype)

    return MicroBatch(
        input_ids=stream([s.input_ids for s in samples], 0, torch.int64),
        labels=stream([s.labels for s in samples], 0, torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=stream([s.loss_mask for s in samples], False, torch.bool),
        advantages=stream([s.advantages for s in samples], 0.0, torch.float32),
        rollout_logp=stream([s.rollout_logprobs for s in samples], 0.0, torch.float32),
        policy_versions=stream([s.policy_versions for s in samples], -1, torch.int32),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        groups=torch.tensor([sample.group for sample in samples]),
        weights=torch.tensor(weights, dtype=torch.float64),
        sequence_ids=torch.tensor(ids),
        restarts=stream([_version_starts(sample) for sample in samples], False, torch.bool),
    )


def _version_starts(sample: TrainSample) -> list[bool]:
    """True on the first token that each policy version wrote; what the policy did not write is skipped."""
    starts, last = [], None
    for wrote, version in zip(sample.loss_mask, sample.policy_versions, strict=True):
        starts.append(wrote and version != last)
        last = version if wrote else last
    return starts
