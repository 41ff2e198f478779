"""The reinforcement-learning loop: one asyncio controller for synchronous and asynchronous training.

    feeder:    room -> the next prompt -> collector              (`pipeline`: as many at once as the buffer has room for)
    trainer:   take(step) -> advantages, packing -> offload -> update -> publish(version + 1) -> record

Both are tasks of one group, so the first failure of either ends the run with that failure. With `train.staleness` 0 the
feeder sleeps from the last group of a step until the new weights are published.

At the end of a step the run waits until all that it wrote is on the disk (`record.storage`), where that is at fault.

A run that is asked to stop (`orders`) leaves off what waits for rollouts, ends what the trainer is at, and saves; all attempts
are kept as they are. A run that goes on begins with what was left: evaluations that are owed or due, then the next step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from ctpo_megatron.algorithms.advantages import compute_advantages, shaped_rewards
from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.record import FEWEST_TOKENS
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.data.samples import build_samples, rewarded
from ctpo_megatron.errors import LeftCourse
from ctpo_megatron.loop.admission import Admission, Position
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.checkpoints import Checkpoints, newest_until, steps_in
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.loop.evaluation.evaluations import Evaluations
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.memory import MemoryCopies
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.loop.pipeline import Pipeline, Taken
from ctpo_megatron.loop.protocols import Busy, Decisions, Publisher, Rollouts, Teachers, Trainer
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.report import RunTotals, StepCost
from ctpo_megatron.loop.shrinking import ShrinkingAlarm
from ctpo_megatron.loop.skipping import Skipping
from ctpo_megatron.loop.spikes import SpikeDetector
from ctpo_megatron.loop.state import OpenGroup, RunState
from ctpo_megatron.loop.statistics import expert_load, rollout_metrics, spared_share, train_metrics
from ctpo_megatron.record import PhaseTimer, TailTimer, progress
from ctpo_megatron.record.events import Emit, StepTrained, WeightsPublished, discard
from ctpo_megatron.record.heartbeat import OpenStage, Stages
from ctpo_megatron.record.recorder import SAMPLES
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.record.token_files import TokenRecord
from ctpo_megatron.record.values import Values
from ctpo_megatron.types import TrajectoryGroup

T = TypeVar("T")
Batches = Callable[[list[TrajectoryGroup], RunConfig, float, bool], list[TrainBatch]]  # `make_batches`


class _LeftOff(Exception):
    """The run was asked to stop while it waited for rollouts, or before it would have."""


@dataclass
class TrainLoop:
    """Everything a run is made of; `run` drives it from `first_step` to the end."""

    config: RunConfig
    admission: Admission
    rollouts: Rollouts
    trainer: Trainer
    publisher: Publisher
    record: RunRecord
    evaluations: Evaluations
    checkpoints: Checkpoints | None = None
    ledger: Ledger = field(default_factory=Ledger)  # what became of each group
    decisions: Decisions | None = None  # how steps were made before, by this run or by one whose journal it was given
    teachers: Teachers | None = None  # None: none is on a server
    first_step: int = 0
    samples: int | None = 0  # trained on in the steps that are done; None: not known
    attention_weight: float = 0.0  # see `make_batches`
    spare: bool = False  # the same
    published: Callable[[int, str], None] = lambda _version, _digest: None  # hears which weights each version is
    resources: Callable[[], dict[str, float]] = dict  # what the run's processes use, under the record's names
    busy: Busy | None = None  # for how long its servers have something to do
    tokens_of: Callable[[list[TrainBatch]], Awaitable[TokenRecord | None]] | None = None  # what an update made of its tokens
    bring_back: Callable[[int], Awaitable[None]] | None = None  # lets trainer and servers hold the checkpoint of a step
    skipping: Skipping | None = None  # None: a loss or gradient that is not finite ends the run
    spikes: SpikeDetector | None = None  # None: nobody is told of loss spikes and reward collapses
    shrinking: ShrinkingAlarm | None = None  # None: nobody is told of corrections that leave little of a batch
    returns: int = 0  # how often the run may still go back because of these
    emit: Emit = discard
    orders: Orders = field(default_factory=Orders)
    stages: Stages = field(default_factory=Stages)  # what the driver is doing
    storage: Storage = field(default_factory=Storage)  # what carries the run over faults of its disk
    totals: RunTotals = field(default_factory=RunTotals)
    position: Position | None = None  # behind the last step that was made; None: where the loop began
    memory: MemoryCopies | None = None  # None: there are no copies in memory
    unsaved: RunState | None = None  # where it begins, if that is not in a checkpoint
    tracing: Callable[[int], AbstractAsyncContextManager[None]] = lambda _step: nullcontext()  # what traces a step
    # what a simulation puts in the place of tokens and of a bar for people
    batches_of: Batches = field(default_factory=lambda: make_batches)
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = progress
    _trained: RunState | None = None  # after the last step whose weights the trainer holds; None: where it began

    @property
    def done(self) -> int:
        """Training steps whose result the trainer holds, or a checkpoint."""
        return self.first_step if self._trained is None else self._trained.step

    @property
    def accuracies(self) -> dict[int, float]:
        """Held-out accuracy by the training steps before it."""
        return self.evaluations.accuracies

    async def run(self) -> StopRequest | None:
        """Train to the configured number of steps, or until `orders` says stop, which is returned then.

        Exceptions of any part come out as they are.
        """
        train = self.config.train
        self._trained = self.unsaved
        self._saved = self.first_step if self.unsaved is None else 0  # the newest step with a checkpoint, as far as it knows
        buffer = GroupBuffer(
            StepRules.of(self.config),
            first_step=self.first_step,
            last_step=train.steps,
            admitted=self.admission.groups,
            decisions=self.decisions,
        )
        rollout = self.config.rollout
        self._pipeline = Pipeline(self.admission, buffer, self.ledger, self.rollouts, rollout, self.emit, self.teachers)
        stopped = None
        try:
            try:
                await self._make_up()
                if self.evaluations.due(self.first_step):
                    await self._with_servers(self.evaluations.evaluate(self.first_step))
                await self._produce_and_consume()
                await self._with_servers(self.evaluations.settled())
                await self._make_up()
            except _LeftOff:
                stopped = self.orders.stop_request
                await self._keep_everything()
            if self.checkpoints is not None:
                await self.checkpoints.settle()
            await self._written()
        finally:
            await self.evaluations.abandon()
            if self.checkpoints is not None:
                await self.checkpoints.abandon()
        return stopped

    async def _produce_and_consume(self) -> None:
        producer = asyncio.ensure_future(self._pipeline.feed())
        consumer = asyncio.ensure_future(self._consume())
        try:
            await first_failure(producer, consumer)
        finally:
            for task in (producer, consumer):
                task.cancel()
            await asyncio.gather(producer, consumer, return_exceptions=True)

    async def _consume(self) -> None:
        for step in range(self.first_step, self.config.train.steps):
            async with self.tracing(step + 1):
                await self._step(step)
        if self.orders.stop_request is not None:
            raise _LeftOff
        self.ledger.end_all(self.config.train.steps)

    async def _step(self, step: int) -> None:
        if self.checkpoints is not None:
            self.checkpoints.check()
        self.evaluations.check()
        clock = asyncio.get_running_loop().time  # of the run: a simulation's is virtual
        timer = PhaseTimer(stages=self.stages, step=step + 1, clock=clock, ended=partial(self.record.phase, step + 1))
        begun = clock()
        if self.busy is not None:
            self.busy.begin()
        tail = TailTimer(self.config.train.prompts_per_step, clock)
        with timer("rollout") as stage:
            taken = await self._take(step, tail, stage)
        groups, self.position = taken.groups, taken.position
        with timer("batch"):
            batches = self.batches_of(groups, self.config, self.attention_weight, self.spare)
        with timer("sleep"):
            await self.publisher.offload()
        with timer("train"):
            stats = await self._update(batches, step)
            tokens = None if self.tokens_of is None else await self.tokens_of(batches)
        if tokens is not None:
            self.record.tokens(step + 1, tokens)
        if self.samples is not None:
            self.samples += sum(len(group.trajectories) for group in groups)
        self._trained = self._state_after(step)
        with timer("publish"):
            published = await self._publish(step + 1)
        metrics = rollout_metrics(groups, step) | taken.metrics | spared_share(batches, groups) | train_metrics(stats) | published
        metrics |= {"time/rollout_tail": tail.seconds} | ({} if self.busy is None else self.busy.metrics())
        cost = StepCost.of(groups, timer.seconds, clock() - begun)
        self.record.step(step + 1, groups, metrics | cost.metrics() | self._state_of_host(), expert_load(stats))
        self.record.ratios(step + 1, stats)
        self._judge(step + 1, metrics)
        self.totals.add_step(cost, metrics.get("drift/max", 0.0))
        if self.evaluations.due(step + 1):
            with timer("evaluate"):
                await self._evaluate(step + 1)
        self.record.obey(self.orders)
        asked = self.orders.take_save()
        if (asked or self._save_due(step + 1)) and self.checkpoints is not None:
            with timer("checkpoint"):
                await self._save(self._state_after(step))
            self.record.checkpoint(step + 1, timer.seconds["checkpoint"])
        with timer("storage"):
            await self._written()
        self.emit(StepTrained(step + 1, clock() - begun, timer.seconds, tail.seconds))
        if self.memory is not None:
            self.memory.keep(self._state_after(step))
        self._pipeline.buffer.published(step + 1)

    def _state_of_host(self) -> dict[str, float]:
        """Returns how far the run is, and what its processes use."""
        return ({} if self.samples is None else {SAMPLES: float(self.samples)}) | self.resources()

    def _judge(self, step: int, metrics: dict[str, float]) -> None:
        """Tell of shrunk weights, a loss spike or a collapse of the reward. Raises LeftCourse where the run may go back."""
        for shrunk in [] if self.shrinking is None else self.shrinking.step(step, metrics):
            self.emit(shrunk)
        for found in [] if self.spikes is None else self.spikes.step(step, metrics):
            self.emit(found)
            good = step - self.config.train.spikes.patience
            if self.returns and self.checkpoints is not None and newest_until(self.checkpoints.root, good) is not None:
                raise LeftCourse(found.sentence, step=step, good=good)

    async def _publish(self, version: int) -> dict[str, float]:
        """Publish, unless the run is to stop: nothing will be sampled from these weights then."""
        if self.orders.stop_request is not None:
            return {}
        published = await self.publisher.publish(version)
        self.published(version, self.publisher.digest)
        self.emit(weights_published(version, published))
        return published

    async def _save(self, state: RunState) -> None:
        if self.checkpoints is not None and self._saved < state.step:
            await self.checkpoints.save(state)
            self._saved = state.step

    async def _written(self) -> None:
        """Wait until what the disk did not take is on it: a checkpoint that was written beside training, and small records."""
        if self.checkpoints is not None and self.checkpoints.behind and self._trained is not None:
            await self.checkpoints.save(self._as_of_now(self._trained))
            self._saved = self._trained.step
        await self.storage.clear()

    async def _keep_everything(self) -> None:
        """Save the trainer; attempts are kept already. Nothing of the run that is done is only in memory then."""
        if self.evaluations.running is not None:
            await self.rollouts.interrupt()
        if self._trained is not None and self.config.checkpoint.on_stop:
            await self._save(self._as_of_now(self._trained))

    def _as_of_now(self, state: RunState) -> RunState:
        """Returns `state` with the evaluations that are done by now, and those that are not."""
        return replace(state, accuracies=dict(self.accuracies), owed=self.evaluations.unfinished())

    def _save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` training steps: an evaluation that goes on beside training needs its own."""
        every = self.config.checkpoint.every
        return every > 0 and (step % every == 0 or self.evaluations.running == step)

    async def _update(self, batches: list[TrainBatch], step: int) -> Values:
        if self.skipping is None:
            return await self.trainer.update(batches, version=step)
        return await self.skipping.update(self.trainer, batches, step=step + 1)

    def _state_after(self, step: int) -> RunState:
        """Returns the run's state when training step `step`, counted from 0, is done; rollouts may be further."""
        assert self.position is not None, "a step was taken"
        groups, cursor = self.position.groups, self.position.cursor
        still_open = tuple(OpenGroup(each.id.number, each.prompt.key, each.version) for each in self.position.open)
        alarms = self.record.alarms_memory()
        return self._as_of_now(RunState(step + 1, groups, cursor, {}, samples=self.samples, open=still_open, alarms=alarms))

    async def _take(self, step: int, tail: TailTimer, stage: OpenStage) -> Taken:
        """The groups of `step`; meanwhile the progress bar and `stage` follow how many are in."""
        pipeline, wanted = self._pipeline, self.config.train.prompts_per_step
        with self.progress(f"step {step + 1} rollout", wanted) as show:

            def follow() -> None:
                done = tail(pipeline.buffer.finished())
                show(done)
                if (told := f"{done} of {wanted} groups") != stage.detail:
                    stage.beat(told)

            taken = await self._with_servers(pipeline.take(step), follow)
            tail.end()
            show(wanted)
        return taken

    async def _evaluate(self, step: int) -> None:
        """Evaluate what the servers hold: beside training where that can be, and else now."""
        if step < self.config.train.steps and self.orders.stop_request is None and self.config.eval.servers:
            await self._with_servers(self.evaluations.make_room(step))
            await self.publisher.heal()
            if self.evaluations.begin(step):
                return
        await self._with_servers(self.evaluations.evaluate(step))

    async def _make_up(self) -> None:
        """Evaluate the policies of earlier steps that are owed: trainer and servers hold their checkpoints meanwhile."""
        owed = [step for step in sorted(self.evaluations.owed) if self.evaluations.due(step)]
        there = [] if self.checkpoints is None else steps_in(self.checkpoints.root)
        for step in owed:
            if step not in there or self.bring_back is None:
                self.evaluations.lose(step, "there is no checkpoint of that step")
        if self.checkpoints is None or self.bring_back is None or not set(owed).intersection(there):
            return
        if self._trained is not None:
            await self._save(self._as_of_now(self._trained))
        await self.checkpoints.settle()
        await self._written()
        if self.done not in steps_in(self.checkpoints.root):
            return  # nothing to come back to; at the end of the run there is
        for step in owed:
            if step in there:
                await self.bring_back(step)
                await self._with_servers(self.evaluations.evaluate(step))
        await self.bring_back(self.done)

    async def _with_servers(self, rollouts: Coroutine[Any, Any, T], show: Callable[[], None] = lambda: None) -> T:
        """Wait for rollouts. The trainer is idle meanwhile, and brings servers that come late to the version that it holds."""
        waiting = asyncio.ensure_future(rollouts)
        try:
            while not waiting.done():
                if self.orders.stop_request is not None:
                    await self.rollouts.interrupt()
                    raise _LeftOff
                show()
                await self.publisher.heal()
                await asyncio.wait([waiting], timeout=0.2)
            return waiting.result()
        finally:
            waiting.cancel()


def make_batches(
    groups: list[TrajectoryGroup], config: RunConfig, attention_weight: float = 0.0, spare: bool = False
) -> list[TrainBatch]:
    """Cut the groups of a step into `optimizer_steps` batches of whole groups, packed for the trainer's layout.

    `attention_weight` is the model's, where `train.balance` is flops; see `data.balance`. `spare`: whether
    samples without an advantage go without a pass, but for those that the drift is measured on; see `data.sparing`.
    """
    algorithm, parallel, train = config.algorithm, config.parallel, config.train
    advantages = compute_advantages(groups, algorithm.advantage, algorithm.shaping)
    teaching = algorithm.distillation
    teachers = [None if teaching is None else teaching.teacher_of(group.prompt.source) for group in groups]
    samples = [build_samples(group, advantages[index], index, teachers[index]) for index, group in enumerate(groups)]
    if algorithm.gae is not None:
        rewards = shaped_rewards(groups, algorithm.shaping)
        samples = [rewarded(made, group, each) for made, group, each in zip(samples, groups, rewards, strict=True)]
    per_batch = len(groups) // train.optimizer_steps
    return [
        build_train_batch(
            [sample for group in samples[first : first + per_batch] for sample in group],
            aggregation=algorithm.aggregation,
            parallel=parallel,
            max_tokens=train.max_tokens_per_micro_batch,
            first_id=sum(len(group) for group in samples[:first]),
            attention_weight=attention_weight,
            spare_beyond=-(-FEWEST_TOKENS // train.optimizer_steps) if spare else None,
            share_from=train.share_from,
            token_multiple=train.token_multiple,
        )
        for first in range(0, len(groups), per_batch)
    ]


def weights_published(version: int, metrics: Mapping[str, float]) -> WeightsPublished:
    """Returns the event of a publication, from the `metrics` that the publisher gave."""
    return WeightsPublished(version, int(metrics["servers/serving"]), metrics["publish/total"])


async def first_failure(*tasks: asyncio.Future[None]) -> None:
    """Wait for all tasks; raise the first exception as soon as one fails, unwrapped from its exception group."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        error = task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is not None:
            raise error
