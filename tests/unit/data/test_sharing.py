"""Prompts that samples have in common, read once: what is in a micro-batch then, and that nothing of a sample is lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import SequenceMean
from ctpo_megatron.data.dumps import sequences_of
from ctpo_megatron.data.packing import build_train_batch, pack
from ctpo_megatron.data.sharing import common_tokens, families
from ctpo_megatron.types import Supports, TopK, TrainSample
from tests.support.often import often


def sample(prompt: list[int], response: list[int], group: int = 0, *, rows: bool = False) -> TrainSample:
    """As `data.samples` builds it: the last token of the prompt predicts the first of the response."""
    tokens = prompt + response
    mask = [place >= len(prompt) - 1 for place in range(len(tokens) - 1)]
    logp = [-(group + place / 64) if wrote else 0.0 for place, wrote in enumerate(mask)]
    supports = np.where(np.array(mask)[:, None], np.arange(len(mask) * 2).reshape(-1, 2), -1).astype(np.int32)
    top_k = TopK(np.arange(len(mask), dtype=np.int32)[:, None], np.zeros((len(mask), 1), np.float32))
    return TrainSample(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        mask=mask,
        rollout_logp=logp,
        versions=[0 if wrote else -1 for wrote in mask],
        advantages=[float(wrote) for wrote in mask],
        group=group,
        top_k=top_k if rows else None,
        supports=Supports.of_rows(supports) if rows else None,
        teacher=group % 2 if rows else None,
        teacher_logp=[2 * x for x in logp] if rows else None,
    )


def test_by_hand() -> None:
    """Prompt 7 8 9 with two responses: 7 8 is read once, and each response has its own 9."""
    both = [sample([7, 8, 9], [1, 2]), sample([7, 8, 9], [3, 4, 5])]
    ((mb,),) = pack(both, dp=1, max_tokens=64, share_from=1)
    assert mb.tokens.input_ids.tolist() == [7, 8, 9, 1, 9, 3, 4]
    assert mb.tokens.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert mb.tokens.labels.tolist()[2:] == [1, 2, 3, 4, 5]
    assert mb.tokens.mask.tolist() == [False, False, True, True, True, True, True]
    assert mb.sequences.cu_seqlens.tolist() == [0, 2, 4, 7]
    assert mb.sequences.prefixes is not None
    assert mb.sequences.prefixes.tolist() == [-1, 0, 0]
    assert mb.sequences.ids.tolist() == [-1, 0, 1]
    assert mb.sequences.weights.tolist() == [0.0, 1.0, 1.0]
    assert [rows.tolist() for _, rows, _ in sequences_of(mb)] == [[0, 1, 2, 3], [0, 1, 4, 5, 6]]
    assert mb.counted(1).all()


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([sample([1, 2, 3], [4]), sample([1, 2, 3], [5])], 2),
        ([sample([1, 2, 3], [4]), sample([1, 2, 3, 4], [5])], 2),  # where one of them began to write
        ([sample([1, 2, 3], [4]), sample([1, 2, 9], [5])], 1),
        ([sample([1, 2, 3], [4]), sample([1, 9, 3], [5])], 0),  # the label of 1 is another
        ([sample([1, 2], [4]), sample([9, 2], [5])], 0),
        ([sample([1], [4, 4]), sample([1], [4, 5])], 0),  # what was written is never shared
    ],
)
def test_common_tokens(samples: list[TrainSample], expected: int) -> None:
    assert common_tokens(samples) == expected


def drawn(seed: int, groups: int, *, rows: bool = False) -> list[TrainSample]:
    rng = random.Random(seed)
    samples = []
    for group in range(groups):
        prompt = [rng.randrange(99) for _ in range(rng.randint(1, 9))]
        for _ in range(rng.randint(1, 5)):
            own = prompt + [rng.randrange(99)] * (rng.random() < 0.2)  # an agent's own prompt
            samples.append(sample(own, [rng.randrange(99) for _ in range(rng.randint(1, 12))], group, rows=rows))
    return samples


LAYOUTS = [{}, {"tp": 2}, {"cp": 2}, {"dp": 3}, {"tp": 2, "cp": 2, "dp": 2}]


@settings(max_examples=often(60))
@given(st.integers(0, 2**16), st.integers(1, 5), st.sampled_from(LAYOUTS), st.integers(1, 6), st.booleans())
def test_every_sample_is_there_once_and_whole(seed: int, groups: int, sizes: dict[str, int], fewest: int, rows: bool) -> None:
    samples, parallel = drawn(seed, groups, rows=rows), ParallelConfig(**sizes)
    options = {"aggregation": SequenceMean(), "parallel": parallel, "max_tokens": 32}
    shared = build_train_batch(samples, **options, share_from=fewest)
    apart = build_train_batch(samples, **options)
    assert shared.ids() == apart.ids() == list(range(len(samples)))
    assert by_number(shared.micro_batches) == by_number(apart.micro_batches)
    for mb in (mb for row in shared.micro_batches for mb in row):
        assert mb.positions <= 32 * parallel.cp
        assert mb.positions % (parallel.cp * parallel.tp) == 0
        assert not mb.tokens.mask[mb.sequences.weights.repeat_interleave(mb.sequences.cu_seqlens.diff()) == 0].any()


def by_number(rows: list[list[MicroBatch]]) -> dict[int, list[object]]:
    """Everything that is said of each sample, by its number."""
    found = {}
    for mb in (mb for row in rows for mb in row):
        for place, at, number in sequences_of(mb):
            streams = {name: getattr(mb.tokens, name) for name in mb.tokens.__dataclass_fields__}
            said: list[object] = [
                stream[at].tolist() for name, stream in streams.items() if stream is not None and name != "support_ids"
            ]
            said += [mb.sequences.weights[place].item(), mb.sequences.groups[place].item()]
            said += [] if mb.sequences.teachers is None else [mb.sequences.teachers[place].item()]
            found[number] = said
    return found


@settings(max_examples=often(60))
@given(st.integers(0, 2**16), st.integers(1, 4), st.sampled_from([1, 4]), st.integers(24, 64))
def test_families_fit_and_share_what_they_say(seed: int, groups: int, step: int, capacity: int) -> None:
    samples = drawn(seed, groups)
    found = families(samples, fewest=2, capacity=capacity, step=step)
    assert [place for family in found for place in family.members] == list(range(len(samples)))
    for family in found:
        chosen = [samples[place] for place in family.members]
        assert family.positions(samples, step) <= capacity
        assert family.shared == 0 or (len(chosen) > 1 and 2 <= family.shared <= common_tokens(chosen))
        assert len({each.group for each in chosen}) == 1


def test_a_group_that_does_not_fit_is_cut_and_each_part_reads_the_prompt() -> None:
    samples = [sample(list(range(20)), [1] * 10) for _ in range(5)]  # 19 shared, 10 of each one's own
    found = families(samples, fewest=16, capacity=19 + 2 * 10, step=1)
    assert [(family.members, family.shared) for family in found] == [((0, 1), 19), ((2, 3), 19), ((4,), 0)]


def test_a_batch_takes_fewer_positions() -> None:
    samples = [sample(list(range(200)), [1] * 200, group) for group in range(4) for _ in range(8)]
    took = {
        share: sum(mb.positions for row in pack(samples, dp=1, max_tokens=4096, share_from=share) for mb in row)
        for share in (None, 64)
    }
    assert took == {None: 32 * 399, 64: 4 * (199 + 8 * 200)}


def test_a_group_goes_to_as_many_replicas_as_there_are() -> None:
    samples = [sample(list(range(20)), [1] * 10, group) for group in range(2) for _ in range(8)]
    rows = pack(samples, dp=8, max_tokens=4096, share_from=16)
    longest = max(sum(mb.positions for mb in row) for row in rows)
    assert longest <= 2 * 29, "no replica has more than if each sample read its own"


def test_a_sample_alone_shares_nothing() -> None:
    (row,) = pack([sample([1, 2, 3], [4])], dp=1, max_tokens=8, share_from=1)
    assert row[0].sequences.prefixes is None
    assert torch.equal(row[0].sequences.shared_lengths(), torch.tensor([0]))
