"""What ranks keep of an update, joined: each token's numbers at its place, over shards, micro-batches and optimizer steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ctpo_megatron.algorithms import Seen
from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.cluster.trainer.kept_tokens import join_tokens
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.mcore.kept_tokens import KeptTokens
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.record.token_files import NOT_TRAINED
from ctpo_megatron.types import TrainSample

LENGTHS = (9, 4, 13, 6)


def sample(number: int, length: int) -> TrainSample:
    """Every token says where it is: its log-prob is -(sample + place / 64); the first third is the prompt."""
    mask = [place >= length // 3 for place in range(length)]
    logp = [-(number + place / 64) if wrote else 0.0 for place, wrote in enumerate(mask)]
    versions = [0 if wrote else -1 for wrote in mask]
    return TrainSample([1] * length, [1] * length, mask, logp, versions, [float(wrote) for wrote in mask], group=number)


def batches_of(parallel: ParallelConfig) -> list[TrainBatch]:
    """Two optimizer steps of two samples each."""
    made = [sample(number, length) for number, length in enumerate(LENGTHS)]
    options = {"aggregation": TokenMean(), "parallel": parallel, "max_tokens": 16}
    return [build_train_batch(made[first : first + 2], first_id=first, **options) for first in (0, 2)]


def kept_by(coords: RankCoords, batches: list[TrainBatch], applied: int) -> KeptTokens:
    """What the rank at `coords` keeps whose gaps and log-ratios are the sampled log-probs and twice those."""
    kept = KeptTokens()
    shards = [[mb.shard(coords.cp_rank, coords.cp_size) for mb in batch.micro_batches[coords.dp_rank]] for batch in batches]
    for number, row in reversed([*enumerate(shards)]):  # the first optimizer step's come last
        note = kept.before(number, row)
        for mb in reversed(row):
            note(mb, mb.tokens.rollout_logp)
    for number, row in enumerate(shards[:applied]):
        see = kept.seen(number, row)
        for mb in reversed(row):  # whatever the schedule's order is
            copied = mb.with_streams(anchor_logp=mb.tokens.rollout_logp)
            streams = 2 * mb.tokens.rollout_logp, (mb.tokens.rollout_logp * 64 % 3).to(torch.uint8)
            half = len(streams[0]) // 2
            see(copied).extend(Seen(streams[0][cut].half(), streams[1][cut]) for cut in (slice(half), slice(half, None)))
    return kept


def joined(parallel: ParallelConfig, applied: int = 2):
    batches = batches_of(parallel)
    coords = [RankCoords(dp_rank=dp, cp_rank=cp, cp_size=parallel.cp) for dp in range(parallel.dp) for cp in range(parallel.cp)]
    return join_tokens([kept_by(each, batches, applied).take() for each in coords], coords, batches)


def written() -> list[float]:
    every = [sample(number, length) for number, length in enumerate(LENGTHS)]
    return [logp for each in every for logp, wrote in zip(each.rollout_logp, each.mask, strict=True) if wrote]


def test_each_token_is_at_its_place_at_every_layout() -> None:
    for parallel in (ParallelConfig(), ParallelConfig(cp=2, dp=2), ParallelConfig(cp=4)):
        found = joined(parallel)
        assert found is not None
        assert found.lengths.tolist() == [length - length // 3 for length in LENGTHS]
        assert found.gap.tolist() == torch.tensor(written()).half().tolist()
        assert found.log_ratio.tolist() == (2 * torch.tensor(written())).half().tolist()
        assert found.fate.tolist() == (torch.tensor(written()) * 64 % 3).to(torch.uint8).tolist()


def test_a_sample_without_a_pass_has_its_place() -> None:
    made = [sample(number, length) for number, length in enumerate(LENGTHS)]
    made[1:3] = [replace(each, advantages=[0.0] * len(each)) for each in made[1:3]]
    made[0] = replace(made[0], advantages=[1.0 * wrote for wrote in made[0].mask])
    options = {"aggregation": TokenMean(), "parallel": ParallelConfig(), "max_tokens": 16, "spare_beyond": 0}
    batches = [build_train_batch(made[:3], **options)]
    found = join_tokens([kept_by(RankCoords(), batches, 1).take()], [RankCoords()], batches)
    assert found is not None
    wrote = [sum(each.mask) for each in made[:3]]
    assert found.lengths.tolist() == wrote
    assert not np.isnan(found.gap[: wrote[0]]).any()
    assert np.isnan(found.gap[wrote[0] :]).all()
    assert set(found.fate[wrote[0] :]) == {NOT_TRAINED}


def test_a_step_that_was_not_applied_says_so() -> None:
    found = joined(ParallelConfig(cp=2), applied=1)
    assert found is not None
    first = int(found.lengths[:2].sum())
    assert NOT_TRAINED not in found.fate[:first]
    assert set(found.fate[first:].tolist()) == {NOT_TRAINED}
    assert found.gap.tolist() == torch.tensor(written()).half().tolist()


def test_a_step_that_failed_after_its_loss_is_forgotten() -> None:
    batches, coords = batches_of(ParallelConfig()), RankCoords()
    kept = kept_by(coords, batches, 2)
    kept.forget(1)
    found = join_tokens([kept.take()], [coords], batches)
    assert found is not None
    assert set(found.fate[int(found.lengths[:2].sum()) :].tolist()) == {NOT_TRAINED}


def test_nothing_kept_is_no_record() -> None:
    assert join_tokens([[]], [RankCoords()], batches_of(ParallelConfig())) is None
