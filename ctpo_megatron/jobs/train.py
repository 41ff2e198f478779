"""`ctpo train`: the reinforcement-learning run from checked input to summary.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ctpo_megatron.checkpoints.files import all_checkpoints, read_manifest, set_aside
from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.data.prompts import PromptSampler
from ctpo_megatron.errors import CheckpointError, DamagedCheckpoint, InputError
from ctpo_megatron.jobs.inputs import check_servers, load_prompts, prepare_run_dir, read_model
from ctpo_megatron.jobs.publication import make_publisher
from ctpo_megatron.jobs.rollouts import OpenRollouts, open_rollouts
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.loop.checkpoints import Checkpoints
from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.loop.report import RunReport
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.record import Recorder, write_summary
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.tools import make_tool
from ctpo_megatron.types import Prompt


async def train_job(config: RunConfig, *, resume: bool) -> None:
    """Train to train.steps; with `resume` from the newest checkpoint in the run directory that is as it was written."""
    begun = time.monotonic()
    shape = read_model(config)
    check_servers(config, shape)
    chat = ChatTokenizer(config.model.path)
    prompts = load_prompts(config.data.train, config, chat)
    held_out = load_prompts(config.data.eval, config, chat) if config.data.eval else []
    tool = make_tool(config.rollout.tool)
    checkpoint = _checkpoint_to_resume(Path(config.run_dir), config.train.steps, resume)
    run_dir = prepare_run_dir(config)
    total = config.train.steps * config.train.optimizer_steps
    async with (
        Runtime(config, shape, topology_of(config), run_dir, total_steps=total) as runtime,
        open_rollouts(runtime, chat, tool) as rollouts,
    ):
        loop = await runtime.guard(_prepare(runtime, rollouts, run_dir, prompts, held_out, checkpoint))
        print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
        await runtime.guard(loop.run())
        if config.checkpoint.export:
            await runtime.guard(runtime.trainer.save_hf(run_dir / "model"))
    summary = _summary(config, loop.report, time.monotonic() - begun)
    write_summary(run_dir, summary)
    loop.report.close()
    print(f"train: {config.train.steps} steps in {summary['wall_s']:.0f} s; {run_dir / 'summary.json'}")


async def _prepare(
    runtime: Runtime,
    rollouts: OpenRollouts,
    run_dir: Path,
    prompts: list[Prompt],
    held_out: list[Prompt],
    checkpoint: Path | None,
) -> TrainLoop:
    """The loop at its first step; when resuming, with the checkpoint's weights in trainer and servers."""
    config = runtime.config
    publisher = make_publisher(runtime, rollouts.client)
    first_step, sampler, accuracies = 0, PromptSampler(prompts, config.seed), {}
    if checkpoint is not None:
        checkpoint, state = await _load(runtime.trainer, checkpoint)
        first_step, sampler = state["step"], PromptSampler.restore(prompts, state["sampler"])
        accuracies = {int(step): accuracy for step, accuracy in state["accuracies"].items()}
        print(f"resumed from {checkpoint} at step {first_step}", flush=True)
    await publisher.publish(first_step)  # a new run's too: it proves that trainer and servers agree from the start
    report = RunReport(run_dir, config.log, Recorder(run_dir, config.log, first_step=first_step), accuracies)

    def state_after(step: int) -> dict[str, Any]:
        cursor = PromptSampler(prompts, config.seed)  # what was trained on, not what is already in flight
        cursor.next(step * config.train.prompts_per_step)
        return {"step": step, "sampler": cursor.state(), "accuracies": report.accuracies}

    return TrainLoop(
        config=config,
        sampler=sampler,
        eval_prompts=held_out,
        rollouts=rollouts.rollouter,
        trainer=runtime.trainer,
        publisher=publisher,
        report=report,
        checkpoints=Checkpoints(runtime.trainer, run_dir / "checkpoints", config.checkpoint, state_after),
        first_step=first_step,
        attention_weight=attention_weight(runtime.shape) if config.train.balance == "flops" else 0.0,
    )


def _checkpoint_to_resume(run_dir: Path, steps: int, resume: bool) -> Path | None:
    """The newest checkpoint, None for a new run; a new run may not mix its checkpoints with those of an earlier one."""
    root = run_dir / "checkpoints"
    found = _newest(root)
    if not resume:
        if found is not None:
            raise InputError(
                f"{root} holds checkpoints of an earlier run, up to {found.name}: go on from it with --resume, choose another "
                "run_dir, or delete that directory"
            )
        return None
    while found is not None:
        try:
            done = read_manifest(found)["state"]["step"]
        except DamagedCheckpoint as damage:
            found = _one_before(found, damage)
            continue
        if done >= steps:
            raise InputError(f"--resume: {found} already has {done} of train.steps={steps} steps; raise train.steps to go on")
        return found
    raise InputError(f"--resume: no checkpoint in {root}; start without --resume, and set checkpoint.every to save some")


async def _load(trainer: Trainer, checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose files the ranks find as they were written, and its state; damaged ones are set aside."""
    found: Path | None = checkpoint
    while found is not None:
        try:
            return found, await trainer.load(found)
        except DamagedCheckpoint as damage:
            found = _one_before(found, damage)
    raise CheckpointError(f"no checkpoint in {checkpoint.parent} is as it was written; the damaged ones were set aside there")


def _newest(root: Path) -> Path | None:
    found = all_checkpoints(root)
    return found[-1] if found else None


def _one_before(damaged: Path, damage: DamagedCheckpoint) -> Path | None:
    """Set `damaged` aside, say so, and name the verified checkpoint before it."""
    aside, before = set_aside(damaged), _newest(damaged.parent)
    then = f"going on from {before}" if before else "there is none before it"
    print(f"damaged checkpoint: {damage} It is kept as {aside}; {then}", flush=True)
    return before


def _summary(config: RunConfig, report: RunReport, wall: float) -> dict[str, Any]:
    measured = [accuracy for _, accuracy in sorted(report.accuracies.items())]
    return {
        "accuracy_before": measured[0] if measured else None,
        "accuracy_after": measured[-1] if measured else None,
        "steps": config.train.steps,
        "seed": config.seed,
        **report.summary(),
        "wall_s": wall,
        "weight_version": config.train.steps,
    }
