"""What a run does about steps that are not finite: dumps, events, counts, and where it stops."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpo_megatron.batch import Abandoned, TrainBatch, UpdateAbandoned
from ctpo_megatron.checkpoints.files import MANIFEST, VERSION, commit_checkpoint, work_directory
from ctpo_megatron.checkpoints.hashes import file_hash
from ctpo_megatron.cluster.trainer.abandoned import join_abandoned
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import SequenceMean
from ctpo_megatron.config.train import CheckpointConfig
from ctpo_megatron.data.dumps import WEIGHTS, read_dump
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.errors import CheckpointError, NonFiniteError
from ctpo_megatron.jobs.skipping import make_skipping
from ctpo_megatron.loop.checkpoints import Checkpoints
from ctpo_megatron.loop.dumps import all_dumps
from ctpo_megatron.loop.skipping import Skipping
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.events import Event, EventLog
from ctpo_megatron.record.nonfinite_events import DumpLost, StepSkipped
from ctpo_megatron.record.values import Mean, Sum, Values
from ctpo_megatron.types import TrainSample
from tests.support.checkpoints import state_after, write_checkpoint
from tests.support.disks import fill, small_disk
from tests.support.runs import ROOT

SOUND: Values = {"loss": Mean(0.5), "grad_norm": Mean(1.0)}


class Ranks:
    """Gives what it is told to, one step after the other, and saves a file of so many bytes as its weights."""

    def __init__(self, *outcomes: Values | Abandoned, weights: int = 5) -> None:
        self._outcomes = list(outcomes)
        self._weights = weights
        self.saved = 0

    async def update(self, batches: list[TrainBatch], version: int) -> Values:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Abandoned):
            raise UpdateAbandoned(outcome)
        return outcome

    async def supervise(self, batch: TrainBatch) -> Values:
        return await self.update([batch], 0)

    async def save_weights(self, directory: Path) -> None:
        self.saved += 1
        work = work_directory(directory)
        try:
            (work / "__0_0.distcp").write_bytes(bytes(self._weights))
        except OSError as error:
            raise CheckpointError(f"rank 0: {error}") from error
        file = work / "__0_0.distcp"
        files = {file.name: {"size": file.stat().st_size, "digest": file_hash(file)}}
        commit_checkpoint(work, directory, {"version": VERSION, "files": files})

    async def settle(self) -> None: ...


def bad(at: int | None = None, sequence: int | None = None, applied: Values | None = None) -> Abandoned:
    return Abandoned("loss is nan;", at, sequence, applied or {}, [])


def config(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml", list(overrides))


def batches(count: int = 2) -> list[TrainBatch]:
    made = []
    for first in range(0, 3 * count, 3):
        samples = [TrainSample([1, 2], [2, 3], [False, True], [0.0, -1.0], [-1, 0], [0.0, 1.0], group=n) for n in range(3)]
        made.append(
            build_train_batch(samples, aggregation=SequenceMean(), parallel=ParallelConfig(), max_tokens=64, first_id=first)
        )
    return made


def train(skipping: Skipping, ranks: Any, steps: int, first: int = 1, count: int = 2) -> list[Values]:
    async def run() -> list[Values]:
        return [await skipping.update(ranks, batches(count), step=step) for step in range(first, first + steps)]

    return asyncio.run(run())


def test_the_run_goes_on_and_what_was_left_out_is_counted(tmp_path: Path) -> None:
    ranks, events = Ranks(bad(1, applied=SOUND), SOUND, bad(None, sequence=4)), []
    found = train(make_skipping(ranks, config(), tmp_path, events.append), ranks, 3)
    assert [values["skipped_steps"] for values in found] == [Sum(1.0), Sum(0.0), Sum(2.0)]
    metrics = [train_metrics(values) for values in found]
    assert [each.get("train/loss") for each in metrics] == [0.5, 0.5, None]
    for each in metrics:
        require_known(each)
    # the second optimizer step of step 1; in step 3 the one that holds sequence 4
    assert [path.name for path in all_dumps(tmp_path / "dumps")] == ["step_00000001.2", "step_00000003.2"]
    first, second = events
    assert (first.step, first.optimizer_step, first.applied, first.in_a_row) == (1, 2, 1, 1)
    assert (second.step, second.applied, second.in_a_row) == (3, 0, 1), "step 2 was done"
    assert f"ctpo replay {tmp_path / 'dumps' / 'step_00000003.2'}" in second.sentence
    dump = read_dump(tmp_path / "dumps" / "step_00000003.2")
    assert dump.ids[0] == 3
    assert dump.about.sequence == 4


def test_so_many_in_a_row_end_the_run_and_the_error_names_the_dumps(tmp_path: Path) -> None:
    ranks, events = Ranks(bad(0), SOUND, bad(0), bad(0)), []
    skipping = make_skipping(ranks, config("train.nonfinite_limit=2"), tmp_path, events.append)
    train(skipping, ranks, 3, count=1)
    with pytest.raises(NonFiniteError) as caught:
        train(skipping, ranks, 1, first=4, count=1)
    names = [str(tmp_path / "dumps" / f"step_0000000{step}") for step in (3, 4)]
    assert "2 training steps in a row were not applied (train.nonfinite_limit=2). The last: loss is nan;" in str(caught.value)
    assert f"{names[0]}, {names[1]}: look with `ctpo replay {names[0]}`" in str(caught.value)
    assert caught.value.exit_code == 1
    assert [event.in_a_row for event in events] == [1, 1, 2]


def test_weights_that_lie_in_a_checkpoint_or_a_dump_are_linked(tmp_path: Path) -> None:
    """Then the checkpoint may go. After an optimizer step was applied they are others, and are saved."""
    ranks, events = Ranks(bad(0), bad(0), bad(1, applied=SOUND), bad(0), SOUND, bad(0)), []
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 4, state_after(4))
    checkpoints = Checkpoints(ranks, tmp_path / "checkpoints", CheckpointConfig(), events.append)
    settings = config("train.nonfinite_limit=9", "train.nonfinite_dumps=9")
    skipping = make_skipping(ranks, settings, tmp_path, events.append, checkpoints)
    train(skipping, ranks, 1, first=5)
    assert ranks.saved == 0
    dump = tmp_path / "dumps" / "step_00000005.1"
    assert read_dump(dump).about.weights_from == f"{checkpoint}, by hard links"
    assert (dump / WEIGHTS / MANIFEST).samefile(checkpoint / MANIFEST)
    train(skipping, ranks, 1, first=6)
    assert ranks.saved == 0, "those of the dump before"
    train(skipping, ranks, 2, first=7)
    assert ranks.saved == 1, "step 7 had one optimizer step; step 8 none before it"
    train(skipping, ranks, 2, first=9)
    assert ranks.saved == 2, "step 9 was done"
    sizes = [event.dump_bytes for event in events if isinstance(event, StepSkipped)]
    assert sizes[1] < sizes[2], "what is linked takes no room"


def test_the_newest_dumps_are_kept(tmp_path: Path) -> None:
    ranks = Ranks(*[bad(0)] * 4)
    (tmp_path / "dumps" / "step_00000001.tmp").mkdir(parents=True)
    skipping = make_skipping(ranks, config("train.nonfinite_dumps=2", "train.nonfinite_limit=9"), tmp_path, lambda _: None)
    train(skipping, ranks, 4, count=1)
    assert sorted(path.name for path in (tmp_path / "dumps").iterdir()) == ["step_00000003", "step_00000004"]
    none = make_skipping(Ranks(), config("train.nonfinite_dumps=0"), tmp_path / "none", lambda _: None)
    train(none, Ranks(bad(0)), 1)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_is_told_and_leaves_no_half_dump(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        events: list[Event] = []
        log = EventLog(disk / "events.jsonl", [events.append])
        ranks = Ranks(bad(0), bad(0), weights=200_000)
        skipping = make_skipping(ranks, config(), disk, log)
        ballast = fill(disk, leave=40_000)
        train(skipping, ranks, 1, count=1)
        lost, skipped = events
        assert isinstance(lost, DumpLost)
        assert "the dump of step 1 could not be written" in lost.sentence
        assert "no space left" in lost.sentence.lower()
        assert isinstance(skipped, StepSkipped)
        assert skipped.dump is None
        assert list((disk / "dumps").iterdir()) == []
        ballast.unlink()
        train(skipping, ranks, 1, first=2, count=1)
        assert [path.name for path in all_dumps(disk / "dumps")] == ["step_00000002"]
        log.close()
        assert [json.loads(line)["event"] for line in (disk / "events.jsonl").read_text().splitlines()][-1] == "step skipped"


def test_supervised_steps_are_dumped_too(tmp_path: Path) -> None:
    ranks, events = Ranks(bad(0)), []
    skipping = make_skipping(ranks, config(), tmp_path, events.append)
    values = asyncio.run(skipping.supervise(ranks, batches(1)[0], step=3))
    assert values == {"skipped_steps": Sum(1.0)}
    about = read_dump(tmp_path / "dumps" / "step_00000003").about
    assert (about.kind, about.temperature) == ("supervised", 1.0)


def test_shards_of_anchors_are_put_together() -> None:
    """Two context-parallel ranks on each of two pipeline stages; the first stage has none."""
    (batch,) = [
        build_train_batch(
            [TrainSample(list(range(8)), list(range(8)), [True] * 8, [0.0] * 8, [0] * 8, [1.0] * 8) for _ in range(2)],
            aggregation=SequenceMean(),
            parallel=ParallelConfig(cp=2),
            max_tokens=64,
        )
    ]
    (mb,) = batch.micro_batches[0]
    coords = [RankCoords(cp_rank=n % 2, cp_size=2) for n in range(4)]
    shards = [{"anchor_logp": mb.shard(n, 2).tokens.labels.float()} for n in range(2)]
    parts = [Abandoned("nan", 0, None, {}, [[streams]]) for streams in ({}, {}, *shards)]
    joined = join_abandoned(parts, coords, [batch])
    torch.testing.assert_close(joined.anchors[0][0]["anchor_logp"], mb.tokens.labels.float(), rtol=0, atol=0)
