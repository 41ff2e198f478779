"""A batch on the disk is the batch that was dumped, whole, at the layout that it happened at and at any other."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctpo_megatron.batch import MicroBatch, TrainBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import SequenceMean
from ctpo_megatron.data.dumps import ABOUT, BATCH, CONFIG, About, StepDump, read_dump, sequences_of, write_about, write_batch
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.errors import InputError
from ctpo_megatron.types import Supports, TopK, TrainSample
from tests.support.often import often

ABOUT_IT = About(
    kind="policy",
    step=7,
    optimizer_step=2,
    optimizer_steps=4,
    applied=1,
    reason="loss is nan",
    sequence=None,
    policy_version=6,
    temperature=0.7,
    parallel=ParallelConfig(tp=2).model_dump(),
    written=1.5,
    release="0",
    weights_from="the trainer's ranks",
    files={},
)


def draw(seed: int, *, rows: bool) -> list[TrainSample]:
    """Samples with holes in their masks, two versions, and numbers that are none."""
    rng, numbers, samples = random.Random(seed), np.random.default_rng(seed), []
    for n in range(rng.randint(3, 9)):
        length = rng.randint(1, 23)
        mask = [True] + [rng.random() < 0.7 for _ in range(length - 1)]
        values = [rng.choice([rng.gauss(0, 1), float("nan"), float("inf")]) for _ in range(length)]
        supports = np.where(np.array(mask)[:, None], numbers.integers(-1, 99, (length, 1 + n)), -1).astype(np.int32)
        as_float32 = np.asarray(values, np.float32).tolist()
        samples.append(
            TrainSample(
                input_ids=[rng.randrange(99) for _ in range(length)],
                labels=[rng.randrange(99) for _ in range(length)],
                mask=mask,
                rollout_logp=[value if mine else 0.0 for value, mine in zip(as_float32, mask, strict=True)],
                versions=[rng.choice([5, 6]) if mine else -1 for mine in mask],
                advantages=[value if mine else 0.0 for value, mine in zip(as_float32, mask, strict=True)],
                group=n // 2,
                routed_experts=numbers.integers(-1, 4, (length, 2, 2)).astype(np.int8) if rows else None,
                top_k=TopK(numbers.integers(0, 99, (length, 3)).astype(np.int32), -numbers.random((length, 3), np.float32))
                if rows
                else None,
                supports=Supports.of_rows(supports) if rows else None,
                teacher=n % 3 - 1 if rows else None,
                teacher_logp=[value if mine else 0.0 for value, mine in zip(as_float32, mask, strict=True)] if rows else None,
            )
        )
    return samples


def batch_of(samples: list[TrainSample], parallel: ParallelConfig, first_id: int = 5) -> TrainBatch:
    return build_train_batch(samples, aggregation=SequenceMean(), parallel=parallel, max_tokens=32, first_id=first_id)


def written(directory: Path, batch: TrainBatch, anchors: bool = False) -> StepDump:
    directory.mkdir()
    (directory / CONFIG).write_text("name: x\n")
    streams = [[{"anchor_logp": mb.tokens.labels / 7} for mb in row] for row in batch.micro_batches] if anchors else []
    write_batch(directory, batch, streams)
    write_about(directory, ABOUT_IT)
    return read_dump(directory)


@settings(max_examples=often(30), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 2**16), st.booleans(), st.sampled_from([{}, {"tp": 2}, {"cp": 2}, {"dp": 2}, {"tp": 2, "cp": 2, "dp": 3}]))
def test_the_same_layout_gives_the_same_micro_batches(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: bool, layout: dict[str, int]
) -> None:
    parallel = ParallelConfig(**layout)
    batch = batch_of(draw(seed, rows=rows), parallel)
    dump = written(tmp_path_factory.mktemp("dump") / "step", batch)
    again = dump.packed(parallel, 32, 0.0)
    assert [len(row) for row in again] == [len(row) for row in batch.micro_batches]
    for row, expected in zip(again, batch.micro_batches, strict=True):
        for mb, other in zip(row, expected, strict=True):
            assert_equal(mb, other)


def assert_equal(one: MicroBatch, other: MicroBatch) -> None:
    """To the bit: numbers that are none differ from themselves."""
    assert (one.replay is None) == (other.replay is None)
    parts = [(one.tokens, other.tokens), (one.sequences, other.sequences)]
    parts += [(one.replay, other.replay)] if one.replay is not None else []
    for mine, theirs in parts:
        for name in mine.__dataclass_fields__:
            a, b = getattr(mine, name), getattr(theirs, name)
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype, name
                assert a.numpy().tobytes() == b.numpy().tobytes(), name
            else:
                assert a == b, name


def test_another_layout_has_every_sequence_with_its_anchors(tmp_path: Path) -> None:
    batch = batch_of(draw(3, rows=False), ParallelConfig(cp=2, dp=2))
    dump = written(tmp_path / "step", batch, anchors=True)
    found = []
    for row in dump.packed(ParallelConfig(tp=2), 16, 0.0):  # fewer tokens than the longest has: it has a micro-batch anyway
        for mb in row:
            for _, rows, number in sequences_of(mb):
                found.append(number)
                torch.testing.assert_close(mb.tokens.anchor_logp[rows], mb.tokens.labels[rows] / 7, rtol=0, atol=0)
    assert sorted(found) == batch.ids()
    assert dump.about == replace(ABOUT_IT, files=dump.about.files)


def test_what_is_no_dump_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no dump.json; a dump is a directory RUN_DIR/dumps/step_\*"):
        read_dump(tmp_path)
    path = tmp_path / "step"
    written(path, batch_of(draw(4, rows=False), ParallelConfig()))
    content = (path / BATCH).read_bytes()
    (path / BATCH).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"batch.safetensors: its content does not have the hash"):
        read_dump(path)
    (path / BATCH).write_bytes(content)
    about = json.loads((path / ABOUT).read_text())
    for change, words in (({"version": 9}, "format version 9"), ({"step": "7"}, "step: Input should be"), ({"x": 1}, "x: Unexp")):
        (path / ABOUT).write_text(json.dumps(about | change))
        with pytest.raises(InputError, match=words):
            read_dump(path)
    (path / ABOUT).write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_dump(path)


def test_what_is_written_is_json_without_numbers_that_are_none(tmp_path: Path) -> None:
    written(tmp_path / "step", batch_of(draw(5, rows=True), ParallelConfig()))
    assert json.loads((tmp_path / "step" / ABOUT).read_text()).keys() == asdict(ABOUT_IT).keys()
