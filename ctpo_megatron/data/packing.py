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
from typing import get_args

import torch

from ctpo_megatron.batch import MicroBatch, TrainBatch
from ctpo_megatron.config.algorithm import Aggregation
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.types import TrainSample

FILLER = TrainSample([0], [0], [False], [0.0], [-1], [0.0], group=-1)  # for ranks with fewer samples than micro-batches


def pack(samples: Sequence[TrainSample], *, dp: int, max_tokens: int, cp: int = 1, tp: int = 1) -> list[list[MicroBatch]]:
    """Micro-batches [dp][n] that hold all `samples`; see the module's invariants.

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
    bins = _balanced_bins(lengths, capacity, dp)
    return [[_micro_batch([samples[i] for i in members], step, unit) for members in bins[rank]] for rank in range(dp)]


def build_train_batch(
    samples: Sequence[TrainSample], *, aggregation: str, parallel: ParallelConfig, max_tokens: int
) -> TrainBatch:
    """One optimizer step over `samples`: packed, with the normaliser of `aggregation` over all ranks and micro-batches.

    `max_tokens` is per rank, so a pack that cp ranks share holds cp times as many. token-mean divides by the policy's tokens;
    sequence-mean and sequence-sum by the sequences that hold at least one of them. Raises ValueError for an unknown
    aggregation, for samples without any token of the policy, and as `pack` does.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation {aggregation!r}; allowed: {', '.join(get_args(Aggregation))}")
    tokens = sum(sum(sample.loss_mask) for sample in samples)
    sequences = sum(any(sample.loss_mask) for sample in samples)
    if tokens == 0:
        raise ValueError(f"none of the {len(samples)} samples holds a token of the policy; there is nothing to train on")
    normalizer = float(tokens if aggregation == "token-mean" else sequences)
    cp = parallel.cp
    micro_batches = pack(samples, dp=parallel.dp, max_tokens=max_tokens * cp, cp=cp, tp=parallel.tp)
    return TrainBatch(micro_batches, normalizer, sequences, tokens)


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


def _micro_batch(samples: Sequence[TrainSample], step: int, unit: int) -> MicroBatch:
    """One pack; each sequence padded to `step`, the last one further until the total is a multiple of `unit`."""
    samples = samples or [FILLER]
    lengths = [round_up(max(len(sample), 1), step) for sample in samples]
    lengths[-1] += round_up(sum(lengths), unit) - sum(lengths)

    def stream(name: str, padding: float, dtype: torch.dtype) -> torch.Tensor:
        values: list[float] = []
        for sample, length in zip(samples, lengths, strict=True):
            values += getattr(sample, name)
            values += [padding] * (length - len(sample))
        return torch.tensor(values, dtype=dtype)

    return MicroBatch(
        input_ids=stream("input_ids", 0, torch.int64),
        labels=stream("labels", 0, torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=stream("loss_mask", False, torch.bool),
        advantages=stream("advantages", 0.0, torch.float32),
        rollout_logp=stream("rollout_logprobs", 0.0, torch.float32),
        policy_versions=stream("policy_versions", -1, torch.int32),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        groups=torch.tensor([sample.group for sample in samples]),
    )
