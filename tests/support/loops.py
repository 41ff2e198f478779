"""The loop of a run over parts that answer at once, for tests of what it trains on, writes down and goes on from."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.checkpoints.files import VERSION, commit_checkpoint, work_directory
from ctpo_megatron.checkpoints.hashes import file_hash
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.evaluations import bring_back, known_accuracies
from ctpo_megatron.jobs.resume import start_of
from ctpo_megatron.loop.alarms import Hearing
from ctpo_megatron.loop.checkpoints import Checkpoints, Resumable, newest, restore
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.evaluation.evaluations import Evaluations
from ctpo_megatron.loop.ledger import NAME, Ledger
from ctpo_megatron.loop.memory import MemoryCopies
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.report import RunTotals
from ctpo_megatron.loop.shrinking import ShrinkingAlarm
from ctpo_megatron.loop.spikes import SpikeDetector
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.events import Event, discard
from ctpo_megatron.record.storage import Storage
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


class Straggling(Sampled):
    """The first group comes to its end under the second version of the weights."""

    async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
        while group == GroupId(0) and self.ranks.version < 1:
            await asyncio.sleep(0.001)
        return await super().group(prompt, group, **options)


class Noted(MemoryCopies):
    """Notes what would be copied."""

    def __init__(self) -> None:
        self.states: list[RunState] = []

    def keep(self, state: RunState) -> None:
        self.states.append(state)
