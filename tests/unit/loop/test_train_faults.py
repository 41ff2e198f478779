"""The loop over parts that answer at once, when it is stopped, alarmed, sent back, or has nowhere to write."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import ClassVar

import pytest

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.errors import CheckpointUnwritten, LeftCourse
from ctpo_megatron.loop.checkpoints import leave_after, newest, newest_until, steps_in
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.events import CheckpointVerified, StepTrained, discard
from ctpo_megatron.record.mismatch_events import WeightsShrunk
from ctpo_megatron.record.nonfinite_events import OffCourse
from ctpo_megatron.record.storage import MARK, Storage
from ctpo_megatron.record.storage_events import CheckpointDelayed, StorageFault, StorageMended
from ctpo_megatron.record.values import Mean, Values
from tests.support.loops import Collapsing, Noted, Ranks, config, rows, train


def test_a_run_that_is_stopped_saves_the_step_it_was_in_and_leaves_the_rest_to_the_next(tmp_path: Path) -> None:
    """The order comes while the trainer trains step 2, after which an evaluation would be due, and no checkpoint."""
    orders = Orders()

    class Stopping(Ranks):
        versions: ClassVar[list[int]] = []

        async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
            if version == 1:
                orders.stop(StopRequest("a test"))
            return {}

        async def publish(self, version: int) -> dict[str, float]:
            self.versions.append(version)
            return await super().publish(version)

    short = config("train.steps=3", "train.prompts_per_step=2", "checkpoint.every=9", "train.staleness=0")
    _, stopped, _ = asyncio.run(train(short, tmp_path, resume=False, ranks=Stopping(), orders=orders))
    assert (stopped.done, sorted(stopped.accuracies), Stopping.versions) == (2, [0], [1])
    found = newest(tmp_path / "checkpoints", 9, discard)
    assert (found.state.step, found.state.groups, found.state.accuracies.keys()) == (2, 4, {0})
    _, resumed, _ = asyncio.run(train(short, tmp_path, resume=True))
    assert sorted(resumed.accuracies) == [0, 2, 3]


def test_a_reward_that_collapses_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    looking = ("train.spikes.reward=5", "train.spikes.least=4", "train.spikes.window=4", "train.spikes.patience=1")
    wanted = config("train.steps=8", "train.prompts_per_step=2", *looking)
    _, loop, events = asyncio.run(train(wanted, tmp_path, resume=False, rollouts=Collapsing()))
    found = [each for each in events if isinstance(each, OffCourse)]
    assert [(each.kind, each.step, each.value, each.median) for each in found] == [
        ("reward collapse", 7, 0.0, 0.5),
        ("reward collapse", 8, 0.0, 0.5),
    ]
    assert loop.done == 8


def test_weights_of_a_correction_that_vanish_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def shrunk(self: Ranks, batches: list[TrainBatch], version: int) -> Values:
        return {"correction": Mean(0.06), "correction_sq": Mean(0.018), "correction_log": Mean(-12.5)}

    monkeypatch.setattr(Ranks, "update", shrunk)
    wanted = config("train.steps=3", "algorithm.correction={type: truncate, level: sequence}")
    _, _, events = asyncio.run(train(wanted, tmp_path, resume=False))
    (event,) = [each for each in events if isinstance(each, WeightsShrunk)]
    assert (event.step, event.metric, event.value) == (1, "train/correction", 0.06)


def test_a_run_that_may_go_back_leaves_its_course_at_once(tmp_path: Path) -> None:
    looking = ("train.spikes.reward=5", "train.spikes.least=4", "train.spikes.window=4", "train.spikes.patience=1")
    wanted = config("train.steps=8", "train.prompts_per_step=2", "train.spikes.returns=1", *looking)
    with pytest.raises(LeftCourse, match="reward collapse at step 7") as raised:
        asyncio.run(train(wanted, tmp_path, resume=False, rollouts=Collapsing()))
    assert (raised.value.step, raised.value.good) == (7, 6)
    root = tmp_path / "checkpoints"
    leave_after(root, 5)
    assert newest_until(root, 6) == root / "step_00000005"
    assert newest(root, 8, discard).state.step == 5
    assert (root / "step_00000006.off-course").is_dir()


def test_a_run_that_began_at_a_copy_and_is_stopped_at_once_saves_what_it_began_with(tmp_path: Path) -> None:
    """No checkpoint holds it: what the run has learned is not to end with its processes."""
    copies, long = Noted(), config("train.steps=9", "train.prompts_per_step=2", "checkpoint.every=9")
    asyncio.run(train(config("train.steps=2", "train.prompts_per_step=2"), tmp_path, resume=False, memory=copies))
    leave_after(tmp_path / "checkpoints", 1)
    orders = Orders()
    orders.stop(StopRequest("a test"))
    _, loop, _ = asyncio.run(train(long, tmp_path, resume=True, orders=orders, unsaved=copies.states[-1]))
    assert loop.done == 2
    found, began = newest(tmp_path / "checkpoints", 9, discard).state, copies.states[-1]
    assert (found.step, found.groups, found.cursor, found.samples) == (2, began.groups, began.cursor, began.samples)


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_whose_directory_is_away_for_a_while_goes_on_and_has_every_step_once(tmp_path: Path, every: int) -> None:
    run_dir, away, trained = tmp_path / "run", tmp_path / "away", []
    run_dir.mkdir()
    (run_dir / MARK).touch()

    class Moving(Ranks):
        async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
            if version == 1:
                run_dir.rename(away)
                asyncio.get_running_loop().call_later(0.3, away.rename, run_dir)
            trained.append((version, run_dir.exists()))
            return {}

    storage = Storage(run_dir, 20.0, retry_s=0.02)
    four = config("train.steps=4", "train.prompts_per_step=2", f"checkpoint.every={every}")
    _, loop, events = asyncio.run(train(four, run_dir, resume=False, ranks=Moving(), storage=storage))
    assert trained == [(0, True), (1, False), (2, True), (3, True)], "the run went on without its directory"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward/mean" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 2, 4]
    assert [len(rows(run_dir, f"step_{step:08d}.jsonl")) for step in (1, 2, 3, 4)] == [4] * 4
    assert [type(event) for event in events if isinstance(event, StorageFault | StorageMended)] == [StorageFault, StorageMended]
    waited = {event.step: event.seconds for event in events if isinstance(event, StepTrained)}
    assert waited[2] >= 0.25
    assert every == 0 or newest(run_dir / "checkpoints", 9, discard).state.step == 4
    assert loop.done == 4
    assert not away.exists()


@pytest.mark.parametrize("failing", [1, 3])
def test_a_checkpoint_that_finds_no_room_is_made_up_for(tmp_path: Path, failing: int) -> None:
    """So many saves fail: the one after step 2, beside training, and each time that it is tried again after step 3."""

    class Full(Ranks):
        left = failing

        async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
            await asyncio.sleep(0.1)  # the save has failed by then
            return {}

        async def save(self, directory: Path, *, background: bool) -> None:
            if not self.left:
                await super().save(directory, background=background)

        async def settle(self) -> None:
            await asyncio.sleep(0.02)
            if self.left:
                self.left -= 1
                raise CheckpointUnwritten("no space left")

    storage = Storage(tmp_path, 20.0, retry_s=0.02)
    four = config("train.steps=4", "train.prompts_per_step=2", "checkpoint.every=2")
    _, _, events = asyncio.run(train(four, tmp_path, resume=False, ranks=Full(), storage=storage))
    assert [event.step for event in events if isinstance(event, CheckpointDelayed)] == [2]
    assert sum(isinstance(event, StorageFault) for event in events) == (failing > 1)
    assert sum(isinstance(event, StorageMended) for event in events) == (failing > 1)
    assert [event.step for event in events if isinstance(event, CheckpointVerified)] == [3, 4]
    assert newest(tmp_path / "checkpoints", 9, discard).state.step == 4


@pytest.mark.parametrize("then", ["tell", "save", "stop"])
def test_an_alarm_that_is_to_stop_the_run_stops_it_and_one_that_is_to_save_saves(tmp_path: Path, then: str) -> None:
    bound = f"{{talks: {{metric: rollout/turns, above: 0, smooth: 1, patience: 2, then: {then}}}}}"
    settings = config(
        "train.steps=4", "train.prompts_per_step=2", "checkpoint.every=0", "alarms.warmup=0", f"alarms.bounds={bound}"
    )
    orders = Orders()
    _, loop, events = asyncio.run(train(settings, tmp_path, resume=False, orders=orders))
    (raised,) = [each for each in events if isinstance(each, AlarmRaised)]
    assert (raised.alarm, raised.step, raised.since) == ("talks", 2, 1)
    assert loop.done == (2 if then == "stop" else 4)
    assert steps_in(tmp_path / "checkpoints") == ([] if then == "tell" else [2])
    assert (orders.stop_request is not None) == (then == "stop")
    if then == "stop":  # it stands, and so does not stop the run that goes on
        _, loop, _ = asyncio.run(train(settings, tmp_path, resume=True))
        assert loop.done == 4
