"""Mistakes in the trainer that are easily made, each planted inside the ranks. The comparison with one rank must find them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ctpo_megatron import batch
from ctpo_megatron.algorithms import Stats
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore import policy
from ctpo_megatron.mcore.rank import TrainerRank
from ctpo_megatron.parallel import layout
from ctpo_megatron.parallel.layout import shard_indices

_share, _own_experts = policy.policy_share, layout.own_experts


class Fault(NamedTuple):
    """A mistake and where it is made."""

    layout: str
    family: str
    plant: Callable[[TrainerRank], AbstractContextManager[Any]]


def loss_scaled_by_cp(engine: TrainerRank) -> AbstractContextManager[Any]:
    """Each context-parallel rank takes its share for the whole loss."""

    def scaled(*args: Any, **options: Any) -> tuple[Tensor, Stats]:
        loss, stats = _share(*args, **options)
        return loss * engine.parallel.cp, stats

    return patch.object(policy, "policy_share", scaled)


def labels_rolled_over_borders(engine: TrainerRank) -> AbstractContextManager[Any]:
    """Labels are the inputs of the whole pack moved by one, so the last label of a sequence is the next one's first token."""
    return _placed(engine, lambda whole: whole.with_streams(labels=whole.tokens.input_ids.roll(-1)))


def padding_counted(engine: TrainerRank) -> AbstractContextManager[Any]:
    """What fills a sequence up counts as written by the policy, with the sequence's advantage."""

    def widened(whole: MicroBatch) -> MicroBatch:
        mask, advantages = whole.tokens.mask.clone(), whole.tokens.advantages.clone()
        for start, end in pairwise(whole.sequences.cu_seqlens.tolist()):
            last = start + int(mask[start:end].nonzero()[-1])
            mask[last:end] = True
            advantages[last:end] = advantages[last]
        return whole.with_streams(mask=mask, advantages=advantages)

    return _placed(engine, widened)


def data_parallel_share_doubled(engine: TrainerRank) -> AbstractContextManager[Any]:
    """The number of replicas is counted twice when megatron's mean is turned into a sum."""
    return patch.object(engine._stepper, "dp_size", 2 * engine.parallel.dp)


def replay_shifted(_engine: TrainerRank) -> AbstractContextManager[Any]:
    """Every token follows the routing of the token before it."""
    return patch.object(batch, "own_experts", lambda routed, *where: _own_experts(routed.roll(1, 0), *where))


def padding_balanced(_engine: TrainerRank) -> AbstractContextManager[Any]:
    """Experts' losses take padding for tokens."""
    return patch.object(MicroBatch, "counted", lambda shard, _cp_size: torch.ones_like(shard.tokens.mask))


def zigzag_pieces_swapped(engine: TrainerRank) -> AbstractContextManager[Any]:
    """A rank lays the later of its two pieces of each sequence before the earlier one."""

    def swapped(cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
        index = shard_indices(cu_seqlens, cp_rank, cp_size)
        sizes = ((cu_seqlens[1:] - cu_seqlens[:-1]) // (2 * cp_size)).repeat_interleave(2).tolist()
        pieces = list(index.split(sizes))
        return torch.cat([piece for first in range(0, len(pieces), 2) for piece in (pieces[first + 1], pieces[first])])

    return patch.object(batch, "shard_indices", swapped)


def _placed(engine: TrainerRank, change: Callable[[MicroBatch], MicroBatch]) -> AbstractContextManager[Any]:
    """Every whole pack is changed before it is cut and goes to the device."""
    shard = engine._stepper.shard
    return patch.object(engine._stepper, "shard", lambda packs: shard([change(whole) for whole in packs]))


ENGINE_FAULTS: dict[str, Fault] = {
    "loss scaled by CP": Fault("CP2", "qwen3", loss_scaled_by_cp),
    "labels rolled over a border": Fault("CP2", "qwen3", labels_rolled_over_borders),
    "padding counted": Fault("CP2", "qwen3", padding_counted),
    "DP share doubled": Fault("DP2", "qwen3", data_parallel_share_doubled),
    "routing replay shifted by one token": Fault("CP2", "qwen3_moe", replay_shifted),
    "padding balanced over experts": Fault("CP2", "qwen3_moe", padding_balanced),
    "zigzag pieces swapped": Fault("CP2", "qwen3", zigzag_pieces_swapped),
}
