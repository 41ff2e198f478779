"""`ctpo train`: the reinforcement-learning run from checked input to summary.json."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.jobs.inputs import load_prompts, open_model, prepare_run_dir
from ctpo_megatron.jobs.publication import canary_texts, make_publisher
from ctpo_megatron.jobs.resume import Start, checkpoint_to_resume, differences, start_of
from ctpo_megatron.jobs.rollouts import OpenRollouts, open_rollouts
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.loop.checkpoints import Checkpoints, Resumable, restore
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.train import TrainLoop, weights_published
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.record import Recorder, write_summary
from ctpo_megatron.record.events import Emit, Event, EventLog, RunDone, RunReady, RunResumed, StopAsked, print_sentence
from ctpo_megatron.rollout.tools import make_tool
from ctpo_megatron.types import Prompt


@dataclass(frozen=True)
class _Inputs:
    """What the run works on and where it begins, all of it checked."""

    config: RunConfig  # as the user gave it: the device in it is not decided yet
    prompts: list[Prompt]
    held_out: list[Prompt]
    texts: list[list[int]]  # token ids that canaries are made of
    run_dir: Path
    start: Start
    resumable: Resumable | None


async def train_job(config: RunConfig, stop: StopSignal, *, resume: bool) -> None:
    """Train to train.steps; with `resume` from the newest checkpoint in the run directory that is as it was written."""
    begun = time.monotonic()
    model = open_model(config, "train")
    read: list[Event] = []  # told when there is a run directory to write them down in
    tool = make_tool(config.rollout.tool)
    events = EventLog(Path(config.run_dir) / "events.jsonl", [print_sentence])
    try:
        resumable = checkpoint_to_resume(config, resume, events)
        changed = [] if resumable is None else differences(resumable, config, model.shape, events)
        prompts = load_prompts(config.data.train, config, model.chat, read.append, model.shape)
        held_out: list[Prompt] = []
        if config.data.eval:
            held_out = load_prompts(config.data.eval, config, model.chat, read.append, model.shape)
        start = start_of(config, prompts, resumable, changed, events)
        run_dir = prepare_run_dir(config)
        for event in read:
            events(event)
        stop.listen(lambda signal: events(StopAsked(signal)))
        async with (
            Runtime(config, model.shape, topology_of(config), run_dir, total_steps=start.total_steps, emit=events) as runtime,
            open_rollouts(runtime, model.chat, tool) as rollouts,
        ):
            inputs = _Inputs(config, prompts, held_out, canary_texts(prompts, model.chat), run_dir, start, resumable)
            loop = await runtime.guard(_prepare(runtime, rollouts, inputs, events))
            events(RunReady(time.monotonic() - begun))
            await runtime.guard(loop.run())
            if config.checkpoint.export:
                await runtime.guard(runtime.trainer.save_hf(run_dir / "model"))
                model.chat.save(run_dir / "model")
        summary = _summary(config, loop, time.monotonic() - begun)
        write_summary(run_dir, summary)
        loop.record.close()
        events(RunDone(config.train.steps, summary["wall_s"], str(run_dir / "summary.json")))
    finally:
        events.close()


async def _prepare(runtime: Runtime, rollouts: OpenRollouts, inputs: _Inputs, emit: Emit) -> TrainLoop:
    """Returns the loop at its first step; when resuming, with the checkpoint's weights in trainer and servers."""
    config, run_dir = runtime.config, inputs.run_dir
    publisher = make_publisher(runtime, rollouts.client, inputs.texts)
    start = inputs.start if inputs.resumable is None else await _restored(runtime, inputs, inputs.resumable, emit)
    # a new run's weights too: it proves that trainer and servers agree from the start
    emit(weights_published(start.step, await publisher.publish(start.step)))
    saved = dump_config(inputs.config)
    return TrainLoop(
        config=config,
        admission=start.admission,
        eval_prompts=inputs.held_out,
        rollouts=rollouts.rollouter,
        trainer=runtime.trainer,
        publisher=publisher,
        record=RunRecord(run_dir, config.log, Recorder(run_dir, config.log, first_step=start.step)),
        checkpoints=Checkpoints(runtime.trainer, run_dir / "checkpoints", config.checkpoint, emit, resolved=saved),
        first_step=start.step,
        samples=start.samples,
        accuracies=start.accuracies,
        attention_weight=attention_weight(runtime.shape) if config.train.balance == "flops" else 0.0,
        emit=emit,
        stages=runtime.stages,
    )


async def _restored(runtime: Runtime, inputs: _Inputs, chosen: Resumable, emit: Emit) -> Start:
    """Load the checkpoint `chosen` into the trainer; returns where the run begins.

    Where the ranks find it damaged, the one before takes its place, and is compared with the settings as `chosen` was.
    """
    start, found = inputs.start, await restore(runtime.trainer, chosen, emit)
    if found.checkpoint != chosen.checkpoint:
        changed = differences(found, inputs.config, runtime.shape, emit)
        start = start_of(inputs.config, inputs.prompts, found, changed, emit)
        if start.total_steps != inputs.start.total_steps:
            raise CheckpointError(
                f"{chosen.checkpoint} was damaged and is set aside; from {found.checkpoint} the run has {start.total_steps} "
                f"optimizer steps, but the trainer's schedule was made for {inputs.start.total_steps}. Start again with --resume"
            )
    made = found.manifest["scheduler_steps"]
    emit(RunResumed(str(found.checkpoint), start.step, made, found.state.groups, start.samples))
    return start


def _summary(config: RunConfig, loop: TrainLoop, wall: float) -> dict[str, Any]:
    measured = [accuracy for _, accuracy in sorted(loop.accuracies.items())]
    return {
        "accuracy_before": measured[0] if measured else None,
        "accuracy_after": measured[-1] if measured else None,
        "steps": config.train.steps,
        "seed": config.seed,
        **loop.totals.summary(),
        "wall_s": wall,
        "weight_version": config.train.steps,
    }
