"""`ctpo train`: the reinforcement-learning run from checked input to summary.json."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.data.mixture import restored_sampler
from ctpo_megatron.engine.nursery import Nursery
from ctpo_megatron.engine.teachers import AskedTeachers
from ctpo_megatron.errors import CheckpointError, LeftCourse, NoRoom, RayLost, StartLost, StoppedInOrder, TrainerLost
from ctpo_megatron.jobs.evaluations import bring_back, load_benchmarks, make_evaluations, recipes
from ctpo_megatron.jobs.export import export
from ctpo_megatron.jobs.inputs import load_training_prompts, open_model, prepare_run_dir
from ctpo_megatron.jobs.journal import open_journal
from ctpo_megatron.jobs.memory import make_memory
from ctpo_megatron.jobs.orders import obey
from ctpo_megatron.jobs.publication import canary_texts, make_publisher
from ctpo_megatron.jobs.recording import closing_sinks, make_sinks, open_record
from ctpo_megatron.jobs.restarts import Restarts, begin_again
from ctpo_megatron.jobs.resume import Resume, Start, checkpoint_to_resume, differences, is_done, start_of
from ctpo_megatron.jobs.rollouts import OpenRollouts, checked_tool, open_rollouts
from ctpo_megatron.jobs.skipping import make_skipping
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.summary import summary_of, write_whole_summary
from ctpo_megatron.jobs.teachers import ask_teachers, open_teachers
from ctpo_megatron.jobs.time_limit import Lead
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.jobs.tracing import Traces
from ctpo_megatron.loop.admission import Admission, Position
from ctpo_megatron.loop.alarms import Hearing, open_hearing
from ctpo_megatron.loop.checkpoints import Checkpoints, Resumable, leave_after, newest_or_none, restore
from ctpo_megatron.loop.evaluation.evaluate import Benchmark
from ctpo_megatron.loop.ledger import NAME as LEDGER
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.loop.report import RunTotals
from ctpo_megatron.loop.shrinking import ShrinkingAlarm
from ctpo_megatron.loop.sparing import wants_every_sample
from ctpo_megatron.loop.spikes import SpikeDetector
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.loop.train import TrainLoop, weights_published
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.record.events import Emit, Event, RunDone, RunReady, RunResumed, print_sentence
from ctpo_megatron.record.files import last_steps
from ctpo_megatron.record.incarnation import IncarnationLog
from ctpo_megatron.record.nonfinite_events import WentBack
from ctpo_megatron.record.recorder import Sink
from ctpo_megatron.record.run_events import RunStopped, TrainerRestarted
from ctpo_megatron.record.sink_feed import SinkFeed
from ctpo_megatron.record.sink_process import check_sinks
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.types import Prompt

STORAGE_SHARE = 0.5  # of the time that a run has after SIGTERM: how long it then waits for its disk, whatever asked it to stop
GCS_LOST_WITHIN_S = 50.0  # Ray ends this process 63 s after its GCS


@dataclass(frozen=True)
class _Inputs:
    """What the run works on and where it begins, all of it checked."""

    config: RunConfig  # as the user gave it: the device in it is not decided yet
    prompts: list[Prompt]
    benchmarks: list[Benchmark]
    texts: list[list[int]]  # token ids that canaries are made of
    run_dir: Path
    start: Start
    resumable: Resumable | None
    sinks: Sequence[Sink] = ()


async def train_job(config: RunConfig, stop: StopSignal, *, resume: Resume, nursery: Nursery | None = None) -> None:
    """Train to train.steps; with `resume` from the newest checkpoint in the run directory that is as it was written.

    `nursery`: the process that servers are forked from, if any.
    Raises StoppedInOrder where the run was asked to stop and everything is saved.
    """
    begun = time.monotonic()
    if resume == "auto" and is_done(config):
        print(f"{config.run_dir}: this run has done its {config.train.steps} steps")
        return
    check_sinks(config.log.sinks)
    model = open_model(config, "train")
    await ask_teachers(config)
    hearing = open_hearing(config)
    read: list[Event] = []  # told when there is a run directory to write them down in
    tool = checked_tool(config.rollout)
    lead, feed = Lead(), SinkFeed()
    storage = Storage(Path(config.run_dir), config.checkpoint.storage_wait_s, STORAGE_SHARE * config.cluster.stop_grace_s)
    events = IncarnationLog(Path(config.run_dir), [print_sentence, lead, hearing, feed], storage.write)
    async with AsyncExitStack() as ends:
        await ends.enter_async_context(closing_sinks(feed, events))
        ends.enter_context(events)
        resumable = checkpoint_to_resume(config, resume, events)
        changed = [] if resumable is None else differences(resumable, config, model.shape, events)
        prompts = load_training_prompts(config, model.chat, read.append, model.shape)
        benchmarks = load_benchmarks(config, model, read.append)
        start = start_of(config, prompts, resumable, changed, events)
        run_dir = prepare_run_dir(config)
        events.begin(checkpoint=None if resumable is None else resumable.checkpoint, step=start.step)
        for event in read:
            events(event)
        feed.begin(make_sinks(config, run_dir, resumed=resumable is not None))
        texts = canary_texts(prompts, model.chat)
        inputs = _Inputs(config, prompts, benchmarks, texts, run_dir, start, resumable, feed.sinks)
        topology, steps = topology_of(config), start.total_steps
        runtime = Runtime(config, model.shape, topology, run_dir, total_steps=steps, emit=events, nursery=nursery)
        async with storage.outlasting(events, runtime.stages), hearing.sending(), AsyncExitStack() as files:
            of_evaluations = recipes(config, benchmarks)
            journal = open_journal(config, run_dir, start.step, events, storage, keep=resume != "no", recipes=of_evaluations)
            if journal is not None:
                files.callback(journal.close)
            run: _Run | None = None
            try:
                async with (
                    runtime,
                    open_rollouts(runtime, model.chat, tool, journal, storage.write) as rollouts,
                    open_teachers(runtime) as teachers,
                ):
                    run = _Run(runtime, rollouts, teachers, inputs, journal, storage, events, begun, lead, hearing)
                    loop = await run.to_its_end(stop)
                    if config.checkpoint.export:
                        await runtime.guard(storage.patiently(partial(export, runtime.trainer, model.chat, run_dir / "model")))
            except (TrainerLost, RayLost, StartLost) as error:  # Ray at any time, others before or after training
                if journal is not None:
                    journal.close()  # it may still gather
                await storage.clear()  # the new beginning reads what this one has written
                raise begin_again(error, run_dir, start.step if run is None else run.done, config.cluster.restarts) from error
            summary = summary_of(config, loop, time.monotonic() - begun)
            await storage.patiently(partial(write_whole_summary, run_dir, summary, events))
            events(RunDone(config.train.steps, summary["wall_s"], str(run_dir / "summary.json")))


class _Run:
    """The loop of a run over processes that are up; a trainer that is lost is started again, and the loop with it."""

    def __init__(
        self,
        runtime: Runtime,
        rollouts: OpenRollouts,
        teachers: AskedTeachers | None,
        inputs: _Inputs,
        journal: Journal | None,
        storage: Storage,
        emit: Emit,
        begun: float,
        lead: Lead,
        hearing: Hearing,
    ) -> None:
        self._runtime, self._rollouts, self._inputs, self._hearing = runtime, rollouts, inputs, hearing
        self._teachers = teachers
        self._journal, self._storage, self._emit, self._begun, self._lead = journal, storage, emit, begun, lead
        self._totals, self._returns = RunTotals(), inputs.config.train.spikes.returns
        self._memory = make_memory(runtime, inputs.config, inputs.run_dir, emit)
        self.done = inputs.start.step  # training steps whose result is kept

    async def to_its_end(self, stop: StopSignal) -> TrainLoop:
        """Returns the loop that came to its end. Raises StoppedInOrder, and RayLost where all has to begin anew."""
        config, run_dir = self._inputs.config, self._inputs.run_dir
        loop = await self._runtime.guard(self._prepare(self._inputs.start, self._inputs.resumable))
        self._emit(RunReady(time.monotonic() - self._begun))
        obeying = obey(stop, config, run_dir, self._storage, self._emit, self._lead)
        async with obeying as orders, _watching_gcs(self._runtime, orders):
            loop, stopped = await self._memory.guarding(self._supervised(loop, orders))
        if stopped is not None and stopped.again:
            raise RayLost(stopped.reason)
        if stopped is not None:
            self._emit(RunStopped(stopped.reason, loop.done))
            raise StoppedInOrder(
                f"stopped in order after step {loop.done} of {config.train.steps}: {stopped.reason}. Everything is saved in "
                f"{run_dir}; the same command with --resume auto goes on"
            )
        return loop

    async def _supervised(self, loop: TrainLoop, orders: Orders) -> tuple[TrainLoop, StopRequest | None]:
        """Returns the loop that ended, and why it was stopped.

        One whose trainer is lost is followed by another, and so is one that left its course and may go back.
        """
        restarts, following = Restarts(self._inputs.config.cluster.restarts), None
        while True:
            try:
                if following is not None:
                    loop = await following()
                loop.orders, loop.returns = orders, self._returns
                return loop, await self._runtime.guard(loop.run(), rescue=self._rollouts.rollouter.interrupt)
            except LeftCourse as error:
                self._returns -= 1
                following = partial(self._back, error, loop.position or self._inputs.start.position)
            except TrainerLost as error:
                following = partial(self._again, time.monotonic())
                restart = restarts.next(error, loop.done)
                self._emit(restart)
                await asyncio.sleep(restart.wait_s)
            except NoRoom as error:
                raise await self._given_up(error) from error
            finally:
                self.done = loop.done
                loop.record.close()
                loop.ledger.close()

    async def _given_up(self, error: NoRoom) -> StoppedInOrder:
        """Returns the end of a run whose trainer has no place any more: elsewhere, as in a job anew, it can go on."""
        found = await self._storage.patiently(self._newest)
        step = 0 if found is None else found.state.step
        self._emit(RunStopped(str(error), step))
        return StoppedInOrder(
            f"stopped at the checkpoint of step {step}: {error}. What was sampled since is kept too; the same command with "
            "--resume auto goes on where there is room"
        )

    async def _again(self, lost: float) -> TrainLoop:
        """Returns a loop over a trainer that was started again, at the newest copy in memory or checkpoint."""
        inputs, emit = self._inputs, self._emit
        await self._storage.clear()  # a directory that is away seems to hold no checkpoint
        await self._runtime.restart_trainer()
        found = await self._runtime.guard(self._memory.recall(inputs.run_dir / "checkpoints"))
        found = found or await self._storage.patiently(self._newest)
        changed = [] if found is None else differences(found, inputs.config, self._runtime.shape, emit)
        start = start_of(inputs.config, inputs.prompts, found, changed, emit)
        if self._journal is not None:
            self._journal.go_back(start.step)
        self._rollouts.rollouter.go_on()
        loop = await self._runtime.guard(self._prepare(start, found))
        emit(TrainerRestarted(start.step, time.monotonic() - lost))
        return loop

    async def _back(self, error: LeftCourse, position: Position) -> TrainLoop:
        """Returns a loop at the newest checkpoint from before the run left its course, with the prompts behind `position`."""
        inputs, emit = self._inputs, self._emit
        leave_after(inputs.run_dir / "checkpoints", error.good)
        self._memory.forget()
        found = await self._storage.patiently(self._newest)
        start = start_of(inputs.config, inputs.prompts, found, [], emit)
        sampler = restored_sampler(inputs.prompts, inputs.config.data, inputs.config.seed, position.cursor)
        if self._journal is not None:
            self._journal.go_back(start.step)
        going_on = replace(start, admission=Admission(sampler, position.groups, position.open), position=position)
        loop = await self._runtime.guard(self._prepare(going_on, found, passed_over=True))
        emit(WentBack(error.step, start.step, position.ended - start.position.ended))
        return loop

    async def _newest(self) -> Resumable | None:
        return newest_or_none(self._inputs.run_dir / "checkpoints", self._emit)

    async def _prepare(self, start: Start, chosen: Resumable | None, *, passed_over: bool = False) -> TrainLoop:
        """Returns the loop at its first step; where it goes on, with the checkpoint's weights in trainer and servers.

        `passed_over`: the groups of the steps behind the checkpoint, or an earlier one, are not admitted again.
        """
        runtime, inputs, emit = self._runtime, self._inputs, self._emit
        config, run_dir = runtime.config, inputs.run_dir
        publisher = make_publisher(runtime, self._rollouts.client, inputs.texts)
        if chosen is not None:
            restored = await _restored(runtime, inputs, start, chosen, emit)
            start = replace(restored, admission=start.admission, position=start.position) if passed_over else restored
        published = await publisher.publish(start.step)  # of a new run too: it proves that trainer and servers agree
        self._published(start.step, publisher.digest)
        emit(weights_published(start.step, published))
        opening = partial(open_record, inputs.config, run_dir, start, inputs.sinks, self._hearing, emit, self._storage)
        record = await self._storage.patiently(opening)
        over = inputs.benchmarks, self._rollouts, runtime.fleet
        evaluations = make_evaluations(config, *over, start, run_dir, record, self._totals, emit)
        checkpoints = Checkpoints(
            runtime.trainer,
            run_dir / "checkpoints",
            config.checkpoint,
            emit,
            resolved=dump_config(inputs.config),
            on_kept=self._forget,
            needed=evaluations.unfinished,
            storage=self._storage,
        )
        return TrainLoop(
            config=config,
            admission=start.admission,
            rollouts=self._rollouts.rollouter,
            trainer=runtime.trainer,
            publisher=publisher,
            record=record,
            evaluations=evaluations,
            tokens_of=runtime.trainer.tokens if config.log.save_rollouts and config.log.save_tokens else None,
            bring_back=partial(bring_back, runtime.trainer, publisher, run_dir / "checkpoints", self._published),
            checkpoints=checkpoints,
            teachers=self._teachers,
            ledger=await self._storage.patiently(partial(self._ledger, start, passed_over)),
            decisions=self._journal,
            first_step=start.step,
            samples=start.samples,
            attention_weight=attention_weight(runtime.shape) if config.train.balance == "flops" else 0.0,
            spare=wants_every_sample(config, runtime.shape) is None,
            published=self._published,
            totals=self._totals,
            skipping=make_skipping(runtime.trainer, inputs.config.in_layout(config.parallel), run_dir, emit, checkpoints),
            spikes=await self._storage.patiently(self._spikes),  # behind `open_record`, which drops steps that are made again
            shrinking=ShrinkingAlarm(inputs.config.algorithm),
            emit=emit,
            stages=runtime.stages,
            storage=self._storage,
            memory=self._memory,
            resources=runtime.resources,
            busy=runtime.fleet.busy,
            tracing=Traces(runtime, self._rollouts.client, config, emit),
            unsaved=chosen.state if chosen is not None and chosen.in_memory else None,
        )

    async def _spikes(self) -> SpikeDetector:
        config = self._inputs.config.train.spikes
        return SpikeDetector(config, last_steps(self._inputs.run_dir / "metrics.jsonl", config.window))

    async def _ledger(self, start: Start, passed_over: bool) -> Ledger:
        path, through = self._inputs.run_dir / LEDGER, self._storage.write
        return Ledger(path, step=start.step, position=start.position, gone=start.gone, passed_over=passed_over, through=through)

    def _published(self, version: int, digest: str) -> None:
        if self._journal is not None:
            self._journal.published(version, digest)

    def _forget(self, oldest: RunState) -> None:
        if self._journal is not None and self._inputs.config.checkpoint.journal == "needed":
            self._journal.forget(oldest.oldest_group, oldest.step)


@asynccontextmanager
async def _watching_gcs(runtime: Runtime, orders: Orders) -> AsyncIterator[None]:
    """Inside it, the loss of Ray's GCS lets the run save what it has and begin anew, before Ray ends the process."""

    async def watch() -> None:
        await runtime.gcs_lost()
        orders.stop(StopRequest("Ray's GCS died", GCS_LOST_WITHIN_S, again=True))

    watching = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _restored(runtime: Runtime, inputs: _Inputs, start: Start, chosen: Resumable, emit: Emit) -> Start:
    """Load the checkpoint `chosen` into the trainer; returns where the run begins: `start`, or earlier.

    Where the ranks find it damaged, the one before takes its place, and is compared with the settings as `chosen` was.
    """
    found = await restore(runtime.trainer, chosen, emit)
    if found.checkpoint != chosen.checkpoint:
        changed = differences(found, inputs.config, runtime.shape, emit)
        earlier = start_of(inputs.config, inputs.prompts, found, changed, emit)
        if earlier.total_steps != start.total_steps:
            raise CheckpointError(
                f"{chosen.checkpoint} was damaged and is set aside; from {found.checkpoint} the run has {earlier.total_steps} "
                f"optimizer steps, but the trainer's schedule was made for {start.total_steps}. Start again with --resume"
            )
        start = earlier
    made = found.manifest["scheduler_steps"]
    emit(RunResumed(found.where, start.step, made, found.state.groups - len(found.state.open), start.samples))
    return start
