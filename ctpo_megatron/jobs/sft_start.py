"""Where a run of `ctpo sft` begins: at its first step, or behind a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ctpo_megatron.checkpoints.files import all_checkpoints
from ctpo_megatron.config import RunConfig
from ctpo_megatron.data.demonstrations import Demonstrations
from ctpo_megatron.errors import CheckpointError, DataError, InputError
from ctpo_megatron.jobs.resume import Resume
from ctpo_megatron.loop.checkpoints import Resumable, newest_or_none, refuse_earlier, steps_in
from ctpo_megatron.loop.state import Supervised
from ctpo_megatron.models.files import read_json
from ctpo_megatron.record.events import Emit
from ctpo_megatron.types import TrainSample

Sources = Mapping[str, Sequence[TrainSample]]


@dataclass(frozen=True)
class SftStart:
    """What is done when a run begins, and what follows for the whole of it."""

    demonstrations: Demonstrations
    total_steps: int  # of the whole run
    schedule: int  # optimizer steps that the learning rate's schedule is about
    step: int = 0
    drawn: int = 0
    state: Supervised = field(default_factory=Supervised)


def checkpoint_of_sft(config: RunConfig, resume: Resume, emit: Emit) -> Resumable | None:
    """Returns the newest checkpoint, None for a run that begins. Raises InputError where it cannot be what was asked for."""
    run_dir = Path(config.run_dir)
    root = run_dir / "checkpoints"
    if resume == "no":
        if all_checkpoints(root):
            refuse_earlier(run_dir)
        return None
    try:
        found = newest_or_none(root, emit)
    except CheckpointError as error:
        raise InputError(f"--resume: {error}") from error
    if found is None and resume == "newest":
        raise InputError(f"--resume: no checkpoint in {root}; start without --resume, and set checkpoint.every to save some")
    if found is not None and found.state.supervised is None:
        raise InputError(f"--resume: {found.checkpoint} is of `ctpo train`; go on with that command, or choose another run_dir")
    return found


def sft_start(config: RunConfig, sources: Sources, found: Resumable | None, resume: Resume = "newest") -> SftStart:
    """Returns where a run begins; with `resume` auto that may be its end, of which only the export is missing.

    Raises DataError where the demonstrations are others and data.allow_change is false, InputError where nothing is left to
    train, ConfigError where the schedule does not fit.
    """
    sft, data, seed = config.sft, config.data, config.seed
    if found is None:
        demonstrations = Demonstrations(sources, data, seed)
        total = sft.total_steps(len(demonstrations))
        config.optimizer.check_length(total)
        return SftStart(demonstrations, total, total)
    state = found.state
    assert state.supervised is not None, "checkpoint_of_sft has looked"
    try:
        demonstrations = Demonstrations(sources, data, seed, state.cursor)
    except DataError as error:
        if not data.allow_change:
            raise DataError(
                f"--resume: the demonstrations changed since {found.checkpoint}: {error} Or set data.allow_change=true to go on "
                "with these, counted from their first on"
            ) from error
        demonstrations = Demonstrations(sources, data, seed)
    total = sft.total_steps(len(demonstrations), done=state.step, drawn=state.groups)
    if state.step >= total and resume != "auto":
        raise InputError(
            f"--resume: {found.checkpoint} already has {state.step} of {total} steps; raise sft.steps or sft.epochs to go on"
        )
    schedule = found.manifest["scheduler_steps"] + max(0, total - state.step)
    config.optimizer.check_length(schedule)
    return SftStart(demonstrations, total, schedule, state.step, state.groups, _measured(found, state.supervised, config))


def _measured(found: Resumable, state: Supervised, config: RunConfig) -> Supervised:
    """Returns the state of a run that goes on; the lowest held-out loss only where later ones can be compared with it.

    It cannot where other demonstrations are held out now, or patience would bring back weights that no checkpoint has.
    """
    same = found.config is None or found.config["sft"]["eval"] == config.sft.eval
    kept = config.sft.patience is None or state.best is None or state.best_step in steps_in(found.checkpoint.parent)
    if same and kept:
        return state
    return replace(state, best=None, best_step=0, waited=0)


def is_done(config: RunConfig, examples: int, found: Resumable | None) -> bool:
    """Whether RUN_DIR holds the summary of a run on so many `examples` that has come to its end, by its steps or before them.

    A summary from before the newest checkpoint, `found`, is that of a run that has gone on since.
    """
    summary = Path(config.run_dir) / "summary.json"
    if not summary.is_file():
        return False
    content = read_json(summary)
    done, drawn = (0, 0) if found is None else (found.state.step, found.state.groups)
    made = content.get("steps", 0)
    total = config.sft.total_steps(examples, done=done, drawn=drawn)
    return made >= done and (content.get("end") in ("stop_loss", "patience") or made >= total)
