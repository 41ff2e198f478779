"""The loop over parts that answer at once: what it trains on, writes down and goes on from."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.checkpoints.files import VERSION, commit_checkpoint, work_directory
from ctpo_megatron.checkpoints.hashes import file_hash
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.config.load import load_config
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.errors import CheckpointUnwritten, LeftCourse
from ctpo_megatron.jobs.evaluations import bring_back, known_accuracies
from ctpo_megatron.jobs.resume import start_of
from ctpo_megatron.loop.alarms import Hearing
from ctpo_megatron.loop.checkpoints import Checkpoints, Resumable, leave_after, newest, newest_until, restore, steps_in
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.evaluation.evaluations import Evaluations
from ctpo_megatron.loop.ledger import NAME, Ledger
from ctpo_megatron.loop.memory import MemoryCopies
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.report import RunTotals, StepCost
from ctpo_megatron.loop.shrinking import ShrinkingAlarm
from ctpo_megatron.loop.spikes import SpikeDetector
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.events import CheckpointVerified, EvaluationDone, Event, StepTrained, WeightsPublished, discard
from ctpo_megatron.record.mismatch_events import WeightsShrunk
from ctpo_megatron.record.nonfinite_events import OffCourse
from ctpo_megatron.record.storage import MARK, Storage
from ctpo_megatron.record.storage_events import CheckpointDelayed, StorageFault, StorageMended
from ctpo_megatron.record.token_files import StoredTokens, TokenRecord, token_file
from ctpo_megatron.record.values import Mean, Values
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn
from tests.support.runs import ROOT

PROMPTS = [Prompt(i, ({"role": "user", "content": str(i)},), "1") for i in range(7)]
SEED = 5


class Ranks:
    """Trains nothing, publishes nothing, and saves what the driver wrote."""

    async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
        return {}

    async def supervise(self, batch: TrainBatch) -> dict[str, float]:
        raise NotImplementedError

    async def save(self, directory: Path, *, background: bool) -> None:
        work = work_directory(directory)
        (run,) = work.iterdir()
        files = {run.name: {"size": run.stat().st_size, "digest": file_hash(run)}}
        commit_checkpoint(work, directory, {"version": VERSION, "files": files, "scheduler_steps": 0})

    async def settle(self) -> None: ...

    async def load(self, directory: Path) -> None: ...

    async def save_hf(self, directory: Path) -> None: ...

    digest = "the same"
    version = 0

    async def publish(self, version: int) -> dict[str, float]:
        self.version = version
        return {"publish/total": 0.0, "servers/serving": 2.0}

    async def offload(self) -> None: ...

    async def heal(self) -> None: ...

    def set_aside(self, count: int) -> int:
        return count

    def give_back(self) -> None: ...


@dataclass
class Sampled:
    """Notes which prompts were sampled for training, with the ids of their groups, in the order of admission.

    What it says is of the version that `ranks` have published last.
    """

    seen: list[tuple[int, str]] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)

    async def group(
        self, prompt: Prompt, group: GroupId, *, size: int, sampling: Sampling, aside: bool = False, keep_failed: bool = False
    ) -> TrajectoryGroup:
        if sampling.record:
            self.seen.append((prompt.index, str(group)))
        version = self.ranks.version if group.evaluation is None else group.evaluation
        turns = [Turn("assistant", [1, 2], [-1.0, -1.0], [version] * 2)]
        made = [Trajectory(prompt.index, [3], turns, Status.FINISHED, reward=n % 2, id=AttemptId(group, n)) for n in range(size)]
        return TrajectoryGroup(prompt, made, id=group)

    async def interrupt(self) -> None: ...


class Collapsing(Sampled):
    """Earns no reward from the seventh step of two groups on."""

    async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
        made = await super().group(prompt, group, **options)
        lost = group.evaluation is None and group.number >= 12
        return replace(made, trajectories=[replace(each, reward=0.0) for each in made.trajectories]) if lost else made


def config(*overrides: str) -> RunConfig:
    fixed = ("train.optimizer_steps=1", "train.staleness=1", "rollout.group_size=2", "checkpoint.every=1", f"seed={SEED}")
    return load_config(ROOT / "configs" / "quickstart.yaml", [*fixed, "eval.every=2", "eval.prompts=2", *overrides])


async def train(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool,
    recalled: Resumable | None = None,
    ranks: Ranks | None = None,
    orders: Orders | None = None,
    storage: Storage | None = None,
    rollouts: Sampled | None = None,
    **more: Any,
) -> tuple[list[tuple[int, str]], TrainLoop, list[Event]]:
    ranks, rollouts, events, root = ranks or Ranks(), rollouts or Sampled(), [], run_dir / "checkpoints"
    storage = storage or Storage()
    start, known = start_of(config, PROMPTS, None, [], events.append), {}
    (held_out,) = benchmarks_of(config.data, config.eval, config.rollout)
    benchmarks = [Benchmark(held_out, PROMPTS)]
    if resume:
        found = recalled or await restore(ranks, newest(root, config.train.steps, events.append), events.append)
        start = start_of(config, PROMPTS, found, [], discard)
        known = known_accuracies(run_dir, [*start.owed, start.step], benchmarks, config.train.steps)
    first_step, rollouts.ranks, ranks.version = start.step, ranks, start.step
    recorder = Recorder(run_dir, config.log, first_step=first_step, console=Console(file=io.StringIO()), through=storage.write)
    alarms = await Hearing(None).alarms_of(config, run_dir, events.append, start.alarms)
    record, totals = RunRecord(run_dir, config.log, recorder, storage.write, alarms), RunTotals()
    evaluations = Evaluations(
        benchmarks,
        config.train.steps,
        Evaluator(rollouts, None, SEED),
        record,
        totals,
        start.accuracies | known,
        set(start.owed) - set(known),
        config.eval.servers,
        ranks,
        events.append,
    )
    loop = TrainLoop(
        config=config,
        admission=start.admission,
        rollouts=rollouts,
        trainer=ranks,
        publisher=ranks,
        record=record,
        evaluations=evaluations,
        checkpoints=Checkpoints(ranks, root, config.checkpoint, events.append, needed=evaluations.unfinished, storage=storage),
        bring_back=partial(bring_back, ranks, ranks, root, lambda _version, _digest: None),
        ledger=Ledger(run_dir / NAME, step=first_step, position=start.position, gone=start.gone, through=storage.write),
        totals=totals,
        first_step=first_step,
        samples=start.samples,
        spikes=SpikeDetector(config.train.spikes),
        shrinking=ShrinkingAlarm(config.algorithm),
        returns=config.train.spikes.returns,
        emit=events.append,
        orders=orders or Orders(),
        storage=storage,
        **more,
    )
    async with storage.outlasting(events.append):
        await loop.run()
        loop.record.close()
    assert loop.ledger.unbalanced() == []
    return rollouts.seen, loop, events


def rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "rollouts" / name).read_text().splitlines()]


@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_a_resumed_run_goes_on_at_the_right_prompt_whatever_a_step_takes_now(tmp_path: Path, per_step: int) -> None:
    """Three steps of three groups, then two of `per_step`: no prompt is left out, none comes twice."""
    first, _, _ = asyncio.run(train(config("train.steps=3", "train.prompts_per_step=3"), tmp_path, resume=False))
    more = config("train.steps=5", f"train.prompts_per_step={per_step}", "rollout.group_size=3")
    second, loop, _ = asyncio.run(train(more, tmp_path, resume=True))
    assert loop.samples == 3 * 3 * 2 + 2 * per_step * 3
    assert newest(tmp_path / "checkpoints", 9, discard).state.samples == loop.samples
    expected = [prompt.index for prompt in PromptSampler(PROMPTS, SEED).next(9 + 2 * per_step)]
    assert [index for index, _ in first + second] == expected
    assert [group for _, group in first + second] == [str(GroupId(n)) for n in range(len(expected))]
    assert sorted(loop.accuracies) == [0, 2, 3, 4, 5]


def test_what_was_in_flight_when_a_run_ended_is_sampled_again_under_the_same_ids(tmp_path: Path) -> None:
    """The groups of step 3 were admitted, one step ahead, when the checkpoint after step 2 was written."""
    sizes = ("train.prompts_per_step=3",)
    first, _, _ = asyncio.run(train(config("train.steps=3", *sizes), tmp_path, resume=False))
    (tmp_path / "checkpoints" / "step_00000003").rename(tmp_path / "lost")
    second, _, _ = asyncio.run(train(config("train.steps=3", *sizes), tmp_path, resume=True))
    assert second == first[6:]


class Straggling(Sampled):
    """The first group comes to its end under the second version of the weights."""

    async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
        while group == GroupId(0) and self.ranks.version < 1:
            await asyncio.sleep(0.001)
        return await super().group(prompt, group, **options)


def test_a_group_that_goes_on_is_in_the_checkpoint_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    sizes = ("train.prompts_per_step=2", "train.oversample=1", "train.steps=2", "eval.every=0")
    _, whole, _ = asyncio.run(train(config(*sizes), tmp_path, resume=False, rollouts=Straggling()))
    assert [{row["group"] for row in rows(tmp_path, f"step_0000000{step}.jsonl")} for step in (1, 2)] == [
        {"g00000001", "g00000002"},
        {"g00000000", "g00000003"},
    ]
    (tmp_path / "checkpoints" / "step_00000002").rename(tmp_path / "lost")
    state = newest(tmp_path / "checkpoints", 9, discard).state
    assert (state.groups, [group.number for group in state.open], state.oldest_group) == (3, [0], 0)
    again, resumed, _ = asyncio.run(train(config(*sizes), tmp_path, resume=True, rollouts=Straggling()))
    assert [group for _, group in again] == ["g00000000", "g00000003"]
    assert resumed.ledger.summary() == whole.ledger.summary()
    assert resumed.ledger.summary()["groups"] == {"trained": 4, "filtered": 0, "failed": 0, "aborted": 0}


def test_ids_and_events_reach_the_record(tmp_path: Path) -> None:
    _, loop, events = asyncio.run(train(config("train.steps=2", "train.prompts_per_step=2"), tmp_path, resume=False))
    trained = [row for step in (1, 2) for row in rows(tmp_path, f"step_{step:08d}.jsonl")]
    assert sorted(row["id"] for row in trained) == [f"g0000000{n}.{k}" for n in range(4) for k in range(2)]
    assert {row["group"] for row in rows(tmp_path, "eval_00000002.jsonl")} == {f"e00000002-g0000000{n}" for n in range(2)}
    assert [event.step for event in events if isinstance(event, StepTrained)] == [1, 2]
    assert [event.step for event in events if isinstance(event, EvaluationDone)] == [0, 2]
    assert [event for event in events if isinstance(event, WeightsPublished)] == [WeightsPublished(v, 2, 0.0) for v in (1, 2)]
    summary = loop.totals.summary()
    assert summary["step_seconds"].keys() == {"rollout", "batch", "sleep", "train", "publish", "total"}
    assert summary["rollout_tokens_per_s"] > 0


def test_totals_are_sums_over_steps_and_the_largest_drift() -> None:
    totals = RunTotals()
    for drift in (0.25, 0.5, 0.125):
        totals.add_step(StepCost({"rollout": 2.0, "train": 1.0}, 4.0, sampled_tokens=10, trained_tokens=30), drift)
    totals.add_evaluation(0.5)
    assert totals.summary() == {
        "rollout_tokens_per_s": 5.0,
        "train_tokens_per_s": 30.0,
        "step_seconds": {"rollout": 2.0, "train": 1.0, "total": 4.0},
        "eval_seconds": 0.5,
        "mismatch_max": 0.5,
    }


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


def test_a_checkpoint_that_is_asked_for_comes_once(tmp_path: Path) -> None:
    orders = Orders()
    orders.save()
    asyncio.run(train(config("train.steps=2", "checkpoint.every=0"), tmp_path, resume=False, orders=orders))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


class Noted(MemoryCopies):
    """Notes what would be copied."""

    def __init__(self) -> None:
        self.states: list[RunState] = []

    def keep(self, state: RunState) -> None:
        self.states.append(state)


def test_what_is_copied_is_the_state_after_each_step_with_its_evaluation(tmp_path: Path) -> None:
    copies, three = Noted(), config("train.steps=3", "train.prompts_per_step=2")
    asyncio.run(train(three, tmp_path, resume=False, memory=copies))
    still_open = [[group.number for group in state.open] for state in copies.states]
    assert [(s.step, s.groups, numbers, sorted(s.accuracies)) for s, numbers in zip(copies.states, still_open, strict=True)] == [
        (1, 4, [2, 3], [0]),
        (2, 6, [4, 5], [0, 2]),
        (3, 6, [], [0, 2, 3]),
    ]
    kept = newest(tmp_path / "checkpoints", 9, discard).state
    assert replace(copies.states[-1], alarms=None) == replace(kept, alarms=None)  # of which one has heard of a row more


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


@pytest.mark.parametrize("kept", [True, False])
def test_what_an_update_made_of_its_tokens_is_written_with_the_step(tmp_path: Path, kept: bool) -> None:
    asked: list[int] = []

    async def tokens_of(batches: list[TrainBatch]) -> TokenRecord:
        asked.append(sum(len(batch.ids()) for batch in batches))
        return TokenRecord(np.array([1] * asked[-1]), *(np.full(asked[-1], len(asked)) for _ in range(2)), np.zeros(asked[-1]))

    wanted = config("train.steps=2", "train.prompts_per_step=3")
    asyncio.run(train(wanted, tmp_path, resume=False, tokens_of=tokens_of if kept else None))
    assert asked == [6, 6] * kept
    written = sorted((tmp_path / "tokens").glob("*"))
    assert [path.name for path in written] == [token_file(1), token_file(2)] * kept
    assert [StoredTokens(path).samples(5, 1).gap.tolist() for path in written] == [[1.0], [2.0]] * kept


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
