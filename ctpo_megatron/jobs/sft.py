"""`ctpo sft`: demonstrations in, a Hugging Face model out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.advantages import GroupAdvantage
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.errors import StoppedInOrder
from ctpo_megatron.jobs.export import export
from ctpo_megatron.jobs.inputs import (
    OpenModel,
    check_output,
    load_all_demonstrations,
    load_demonstrations,
    open_model,
    prepare_run_dir,
)
from ctpo_megatron.jobs.orders import obey
from ctpo_megatron.jobs.recording import closing_sinks, make_recorder, make_sinks
from ctpo_megatron.jobs.resume import Resume, differences
from ctpo_megatron.jobs.sft_start import SftStart, Sources, checkpoint_of_sft, is_done, sft_start
from ctpo_megatron.jobs.skipping import make_skipping
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.time_limit import Lead
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.loop.checkpoints import Checkpoints, Resumable, restore
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.loop.sft import SftLoop, SftResult
from ctpo_megatron.record import write_summary
from ctpo_megatron.record.events import Emit, Event, RunReady, print_sentence
from ctpo_megatron.record.incarnation import IncarnationLog
from ctpo_megatron.record.recorder import Sink
from ctpo_megatron.record.run_events import RunStopped
from ctpo_megatron.record.sink_feed import SinkFeed
from ctpo_megatron.record.sink_process import check_sinks
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.types import TrainSample


@dataclass(frozen=True)
class _Inputs:
    """What the run works on and where it begins, all of it checked."""

    config: RunConfig
    model: OpenModel
    sources: Sources
    held_out: list[TrainSample]
    found: Resumable | None
    start: SftStart


async def sft_job(config: RunConfig, stop: StopSignal, *, resume: Resume = "no") -> None:
    """Train on data.train and data.mixture until one of the ends of docs/sft.md, then write sft.output.

    `resume`: from the newest checkpoint in the run directory. Raises StoppedInOrder where the run was asked to stop and all is
    saved.
    """
    begun = time.monotonic()
    check_sinks(config.log.sinks)
    lead, feed = Lead(), SinkFeed()
    storage = Storage(Path(config.run_dir), config.checkpoint.storage_wait_s)
    events = IncarnationLog(Path(config.run_dir), [print_sentence, lead, feed], storage.write)
    async with closing_sinks(feed, events):
        with events:
            read: list[Event] = []  # told when there is a run directory to write them down in
            inputs = _read(config, resume, events, read.append)
            if inputs is None:
                print(f"{config.run_dir}: this run has come to its end")
                return
            run_dir, found = prepare_run_dir(config), inputs.found
            start = inputs.start
            events.begin(checkpoint=None if found is None else found.checkpoint, step=start.step, total=start.total_steps)
            for event in read:
                events(event)
            feed.begin(make_sinks(config, run_dir, resumed=found is not None))
            await _work(inputs, run_dir, storage, events, feed.sinks, stop, lead, begun)


async def _work(
    inputs: _Inputs,
    run_dir: Path,
    storage: Storage,
    emit: Emit,
    sinks: Sequence[Sink],
    stop: StopSignal,
    lead: Lead,
    begun: float,
) -> None:
    """Train to the end, and write what came of it. `begun`: when the command began, by the monotonic clock."""
    config = inputs.config
    output = Path(config.sft.output) if config.sft.output else run_dir / "model"
    one = _supervised(config.in_layout(config.parallel))  # nothing of it is started again
    topology = topology_of(config, engines=False)
    runtime = Runtime(one, inputs.model.shape, topology, run_dir, total_steps=inputs.start.schedule, emit=emit)
    async with storage.outlasting(emit, runtime.stages):
        async with AsyncExitStack() as ends, runtime:
            async with obey(stop, config, run_dir, storage, emit, lead) as orders:
                result = await runtime.guard(_train(runtime, inputs, run_dir, sinks, storage, orders, ends, emit, begun))
            if result.asked is not None:
                emit(RunStopped(result.asked.reason, result.steps))
                raise StoppedInOrder(
                    f"stopped in order after step {result.steps} of {inputs.start.total_steps}: {result.asked.reason}. What was "
                    f"learned is saved in {run_dir}; the same command with --resume auto goes on"
                )
            await runtime.guard(storage.patiently(partial(export, runtime.trainer, inputs.model.chat, output)))
        _sum_up(result, run_dir, output, time.monotonic() - begun)


def _supervised(config: RunConfig) -> RunConfig:
    """The configuration without what only reinforcement learning has in the trainer's ranks: a critic, a reference, teachers."""
    alone = {"advantage": GroupAdvantage(), "reference": None, "distillation": None}
    return config.model_copy(update={"algorithm": config.algorithm.model_copy(update=alone)})


def _read(config: RunConfig, resume: Resume, emit: Emit, emit_read: Emit) -> _Inputs | None:
    """Returns all that the run reads, checked before anything starts; None where it has come to its end. Raises InputError.

    `emit_read` hears of files that were read.
    """
    if resume == "no" and config.sft.epochs is None:  # otherwise the steps are known when the demonstrations are
        config.optimizer.check_length(config.sft.total_steps(1))
    model = open_model(config, "sft")
    if config.sft.output:
        check_output("sft.output", Path(config.sft.output))
    found = checkpoint_of_sft(config, resume, emit)
    if found is not None:
        for each in differences(found, config, model.shape, emit, supervised=True):
            emit(each.event)
    sources = load_all_demonstrations(config, model, emit_read)
    held_out = [] if config.sft.eval is None else load_demonstrations(config.sft.eval, config, model, emit_read)
    examples = sum(map(len, sources.values()))
    if resume == "auto" and is_done(config, examples, found):
        return None
    return _Inputs(config, model, sources, held_out, found, sft_start(config, sources, found, resume))


async def _train(
    runtime: Runtime,
    inputs: _Inputs,
    run_dir: Path,
    sinks: Sequence[Sink],
    storage: Storage,
    orders: Orders,
    ends: AsyncExitStack,
    emit: Emit,
    begun: float,
) -> SftResult:
    """Returns how it ended; the trainer holds what is to be exported. `ends`: closes the record. `begun`: as of `_work`."""
    config, start = inputs.config, inputs.start
    if inputs.found is not None:
        taken = await restore(runtime.trainer, inputs.found, emit)
        start = start if taken is inputs.found else sft_start(config, inputs.sources, taken)
    recorder = make_recorder(config, run_dir, start.step, sinks, emit, storage)
    ends.callback(recorder.close)
    loop = SftLoop(
        config,
        start.demonstrations,
        runtime.trainer,
        recorder,
        held_out=inputs.held_out,
        storage=storage,
        orders=orders,
        first_step=start.step,
        drawn=start.drawn,
        state=start.state,
        emit=emit,
    )
    loop.checkpoints = Checkpoints(
        runtime.trainer,
        run_dir / "checkpoints",
        config.checkpoint,
        emit,
        resolved=dump_config(config),
        needed=loop.needed,
        storage=storage,
    )
    loop.skipping = make_skipping(runtime.trainer, config, run_dir, emit, loop.checkpoints)
    emit(RunReady(time.monotonic() - begun))
    return await loop.run()


def _sum_up(result: SftResult, run_dir: Path, output: Path, wall_s: float) -> None:
    summary = {"steps": result.steps, "loss": result.loss, "tokens": result.tokens, "end": result.end, "wall_s": wall_s}
    measured = ""
    if result.eval_loss is not None:
        summary |= {"eval_loss": result.eval_loss, "eval_step": result.eval_step}
        measured = f", held out {result.eval_loss:.3f} after step {result.eval_step}"
    write_summary(run_dir, summary)
    print(f"sft: {result.steps} steps, loss {result.loss:.3f} per token{measured}, {wall_s:.0f} s; model written to {output}")
