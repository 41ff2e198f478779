"""Packing: the invariants that packing.py states, for any samples and layout, and the normaliser."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import Aggregation, Balanced, Constant, SequenceMean, SequenceSum, TokenMean
from ctpo_megatron.data.packing import build_train_batch, pack
from ctpo_megatron.types import TrainSample
from tests.support.often import often


def sample(length: int, number: int = 0, *, masked_in: bool = True) -> TrainSample:
    """Distinct values in every stream, so a mix-up anywhere shows."""
    mask = [masked_in and t % 3 != 0 for t in range(length)]
    return TrainSample(
        input_ids=[1000 * number + t + 1 for t in range(length)],
        labels=[1000 * number + t + 2 for t in range(length)],
        mask=mask,
        rollout_logp=[-0.5 - number if wrote else 0.0 for wrote in mask],
        versions=[number if wrote else -1 for wrote in mask],
        advantages=[number + 0.25 if wrote else 0.0 for wrote in mask],
        group=number,
    )


def sequences(micro_batch: MicroBatch) -> list[tuple[int, TrainSample, int]]:
    """(group, the sequence with its padding, its length) of each sequence."""
    bounds = micro_batch.sequences.cu_seqlens.tolist()
    found = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        cut = slice(start, end)
        assert micro_batch.tokens.position_ids[cut].tolist() == list(range(end - start))
        streams = (
            *(micro_batch.tokens.input_ids, micro_batch.tokens.labels, micro_batch.tokens.mask),
            *(micro_batch.tokens.rollout_logp, micro_batch.tokens.versions, micro_batch.tokens.advantages),
        )
        found.append((int(micro_batch.sequences.groups[number]), TrainSample(*(s[cut].tolist() for s in streams)), end - start))
    return found


@settings(max_examples=often(150), deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    dp=st.integers(1, 4),
    cp=st.sampled_from([1, 2, 3, 4]),
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    room=st.integers(0, 200),
    token_multiple=st.sampled_from([1, 16]),
)
def test_every_sample_once_within_limits(lengths, dp, cp, tp, room, token_multiple):
    step = 2 * cp if cp > 1 else 1
    unit = math.lcm(step, cp * tp * token_multiple)
    max_tokens = max(lengths) + step + unit + room
    samples = [sample(length, number) for number, length in enumerate(lengths)]
    packed = pack(samples, dp=dp, max_tokens=max_tokens, cp=cp, tp=tp, token_multiple=token_multiple)

    assert len(packed) == dp
    assert len({len(rank) for rank in packed}) == 1
    seen = []
    for micro_batch in (m for rank in packed for m in rank):
        assert len(micro_batch) >= 1
        assert micro_batch.positions <= max_tokens
        assert micro_batch.positions % cp == 0
        assert micro_batch.positions // cp % (tp * token_multiple) == 0
        assert micro_batch.positions == micro_batch.tokens.input_ids.numel()
        found = sequences(micro_batch)
        for place, (group, padded, length) in enumerate(found):
            assert length % step == 0
            if group == -1:
                assert not any(padded.mask)
                assert len(found) == 1
                continue
            seen.append(group)
            true = samples[group]
            assert length - len(true) < (step if place < len(found) - 1 else unit + step)
            padding = length - len(true)
            for name, filler in (
                *(("input_ids", 0), ("labels", 0), ("mask", False)),
                *(("rollout_logp", 0.0), ("versions", -1), ("advantages", 0.0)),
            ):
                assert getattr(padded, name) == getattr(true, name) + [filler] * padding, name
    assert sorted(seen) == list(range(len(samples)))


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_tokens_are_told_from_padding_in_every_shard(cp):
    """Inputs are numbered from 1 and padding is 0; a filler is nothing but padding."""
    packs = pack([sample(length, n) for n, length in enumerate((5, 16, 1, 7))], dp=2, cp=cp, tp=2, max_tokens=32)
    packs += pack([sample(3)], dp=2, cp=cp, tp=2, max_tokens=32)
    for each in itertools.chain.from_iterable(packs):
        shards = [each.shard(rank, cp) for rank in range(cp)]
        counted = [shard.counted(cp) for shard in shards]
        for shard, mine in zip(shards, counted, strict=True):
            assert (mine == (shard.tokens.input_ids > 0)).all()
        assert sum(int(mine.sum()) for mine in counted) == int(each.sequences.lengths.sum())
    assert [int(each.sequences.lengths.sum()) for (each,) in packs[2:]] == [3, 0]


def test_a_rank_without_samples_gets_a_masked_filler():
    packed = pack([sample(5)], dp=2, max_tokens=64, cp=2, tp=4)
    (real,), (filler,) = sorted(packed, key=lambda rank: rank[0].sequences.groups.tolist(), reverse=True)
    assert real.positions == 8
    assert filler.positions == 8
    assert not filler.tokens.mask.any()
    assert filler.sequences.groups.tolist() == [-1]


@pytest.mark.parametrize(("max_tokens", "words"), [(9, "sample 1 has 10 tokens"), (3, "at least 4")])
def test_a_sample_that_does_not_fit_is_named(max_tokens, words):
    with pytest.raises(ValueError, match=words):
        pack([sample(3), sample(10)], dp=1, max_tokens=max_tokens, cp=2, tp=2)


def test_weights_are_those_of_the_whole_batch():
    samples = [sample(7), sample(4), sample(9, masked_in=False)]
    parallel = ParallelConfig(dp=2, cp=2, tp=2)

    def batch(aggregation: Aggregation):
        return build_train_batch(samples, aggregation=aggregation, parallel=parallel, max_tokens=32, first_id=10)

    def by_sample(aggregation: Aggregation) -> dict[int, float]:
        packs = [m for rank in batch(aggregation).micro_batches for m in rank]
        return {int(i): float(w) for m in packs for i, w in zip(m.sequences.ids, m.sequences.weights, strict=True)}

    lengths = [sum(s.mask) for s in samples]
    tokens = sum(lengths)
    expected = {
        TokenMean(): [1 / tokens, 1 / tokens],
        SequenceMean(): [1 / (2 * lengths[0]), 1 / (2 * lengths[1])],
        SequenceSum(): [1 / 2, 1 / 2],
        Constant(tokens=50): [1 / 100, 1 / 100],
    }
    for aggregation, weights in expected.items():
        found = by_sample(aggregation)
        assert [found[10], found[11]] == pytest.approx(weights)
        assert found[12] == 0.0
        assert set(found) <= {10, 11, 12, -1}
    assert sum(int(m.tokens.mask.sum()) for rank in batch(TokenMean()).micro_batches for m in rank) == tokens
    with pytest.raises(ValueError, match="nothing to train on"):
        build_train_batch([sample(5, masked_in=False)], aggregation=TokenMean(), parallel=parallel, max_tokens=32)


def test_restarts_mark_the_first_token_of_each_version():
    cut = TrainSample(
        [1] * 7, [1] * 7, [False, True, True, False, True, True, True], [0.0] * 7, [-1, 3, 3, -1, 3, 5, 5], [0.0] * 7
    )
    (micro_batch,) = pack([cut, sample(3)], dp=1, max_tokens=16)[0]
    starts = micro_batch.tokens.restarts[: len(cut)] if micro_batch.sequences.ids[0] == 0 else micro_batch.tokens.restarts[3:]
    assert starts.tolist() == [False, True, False, False, False, True, False]


def test_max_tokens_is_per_context_parallel_rank():
    batch = build_train_batch([sample(40)], aggregation=TokenMean(), parallel=ParallelConfig(cp=2), max_tokens=20)
    assert batch.micro_batches[0][0].positions == 40
    fp8 = {"max_tokens": 64, "token_multiple": 32}
    batch = build_train_batch([sample(40)], aggregation=TokenMean(), parallel=ParallelConfig(cp=2, tp=2), **fp8)
    assert batch.micro_batches[0][0].positions == 128


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), SequenceSum(), Constant(tokens=7), Balanced()])
def test_an_attempt_weighs_the_same_however_it_is_cut_into_samples(aggregation: Aggregation):
    """Two attempts of 4 tokens: whole, and as branches of 1 and 3, which one token more of a prompt stands before."""

    def made(written: int, attempt: int | None, number: int) -> TrainSample:
        mask = [False] + [True] * written
        ids, zeros = [number] * (written + 1), [0.0] * (written + 1)
        return TrainSample(ids, ids, mask, zeros, [0] * (written + 1), [1.0 * wrote for wrote in mask], 0, attempt)

    def weights(samples: list[TrainSample]) -> list[float]:
        batch = build_train_batch(samples, aggregation=aggregation, parallel=ParallelConfig(), max_tokens=64)
        found = {}
        for micro_batch in (m for rank in batch.micro_batches for m in rank):
            found |= dict(zip(micro_batch.sequences.ids.tolist(), micro_batch.sequences.weights.tolist(), strict=True))
        return [found[number] for number in range(len(samples))]

    whole = weights([made(4, None, 0), made(4, None, 1)])
    cut = weights([made(4, 0, 0), made(1, 1, 1), made(3, 1, 2)])
    assert cut == [whole[0], whole[1], whole[1]]
    assert weights([made(4, None, 0), made(1, None, 1), made(3, None, 2)]) != cut or isinstance(aggregation, TokenMean | Balanced)
