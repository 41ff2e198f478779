"""When a run saves, waits for what it saved, lets old checkpoints go, and which checkpoint it goes on from.

The driver writes run.json and config.yaml into the directory of a checkpoint that is begun, the ranks of the trainer write the
rest, and one manifest commits both (`checkpoints.files`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctpo_megatron.checkpoints.files import (
    CONFIG,
    MODEL,
    RUN,
    all_checkpoints,
    begin_checkpoint,
    prune,
    read_manifest,
    set_aside,
    step_of,
    verified_checkpoints,
    work_directory,
)
from ctpo_megatron.checkpoints.verify import verify_files
from ctpo_megatron.config.train import CheckpointConfig
from ctpo_megatron.errors import (
    CheckpointError,
    CheckpointUnwritten,
    CtpoError,
    DamagedCheckpoint,
    InputError,
    StorageError,
    mendable,
    reason,
    storing,
)
from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.record.events import CheckpointDamaged, CheckpointLost, CheckpointVerified, Emit
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.record.storage_events import CheckpointDelayed, OldCheckpointsStay

LEFT_COURSE = ".off-course"  # of checkpoints that a run went back behind


class Checkpoints:
    """The checkpoints of one run, at most one of them being written. `resolved`: the configuration of the run, as YAML.

    `on_kept` hears the state of the oldest checkpoint that is kept: nothing goes back further.
    `needed`: returns the steps whose checkpoints are to stay, however old they are.
    `storage`: says whether faults of the disk are waited for, and waits.

    save -> (training goes on) -> verified and named -> older ones go
                               -> the disk did not take it: the run is `behind`, and the next save waits until it is verified
                               -> failed otherwise: `check` before the next step ends the run with that error
    """

    def __init__(
        self,
        trainer: Trainer,
        root: Path,
        config: CheckpointConfig,
        emit: Emit,
        *,
        resolved: str | None = None,
        on_kept: Callable[[RunState], None] = lambda _state: None,
        needed: Callable[[], Collection[int]] = tuple,
        storage: Storage | None = None,
    ) -> None:
        self.root = root
        self._storage = storage or Storage()
        self._unwritten: CheckpointUnwritten | None = None  # why there is no checkpoint of the last save
        self._on_kept = on_kept
        self._needed = needed
        self._further = {} if resolved is None else {CONFIG: resolved}
        self._trainer, self._config, self._emit = trainer, config, emit
        self._writing: asyncio.Task[None] | None = None

    @property
    def behind(self) -> bool:
        """Whether the disk did not take the last save, which is to be made up for."""
        return self._unwritten is not None

    async def save(self, state: RunState) -> None:
        """Save the trainer as it is, with `state`, once the save before is settled.

        While the disk does not take it, it is tried again and again, each time to its end.
        """
        await self.settle()
        if self._config.background and not self.behind:
            try:
                await self._begin(state)
                return
            except StorageError as error:
                if not (self._storage.patient and mendable(error)):
                    raise
        await self._storage.patiently(lambda: self._to_its_end(state))

    async def _to_its_end(self, state: RunState) -> None:
        await self._begin(state)
        await self.settle()
        if self._unwritten is not None:
            raise self._unwritten

    async def _begin(self, state: RunState) -> None:
        begun = time.monotonic()
        self._storage.require_home()
        directory = checkpoint_directory(self.root, state.step)
        begin_checkpoint(directory, {RUN: json.dumps(state.dump(), indent=1) + "\n", **self._further})
        await self._trainer.save(directory, background=self._config.background)
        self._writing = asyncio.ensure_future(self._finish(state.step, begun))
        if not self._config.background:
            await self.settle()

    def check(self) -> None:
        """Raise what the save in the background failed with, if it has failed."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    async def settle(self) -> None:
        """Wait for the save in flight; the trainer bounds the wait. Raises what it failed with, once."""
        writing = self._writing
        if writing is not None:
            await asyncio.wait([writing])  # when this is cancelled, the save is still there for `abandon`
            self._writing = None
            writing.result()

    async def abandon(self) -> None:
        """`settle` for a run that ends for another reason: what goes wrong here is told, and the reason stays the reason."""
        try:
            await self.settle()
            if self._unwritten is not None:
                raise self._unwritten
        except (CtpoError, OSError) as error:
            with contextlib.suppress(StorageError):  # the log may be on the disk that is full
                self._emit(CheckpointLost(str(error)))

    async def _finish(self, step: int, begun: float) -> None:
        retried, self._unwritten = self.behind, None
        try:
            await self._trainer.settle()
        except CheckpointUnwritten as error:
            if not self._storage.patient:
                raise
            self._unwritten = error
            # what there is of it takes the room of the next one
            await asyncio.to_thread(shutil.rmtree, work_directory(checkpoint_directory(self.root, step)), ignore_errors=True)
            if not retried:
                self._emit(CheckpointDelayed(step, str(error)))
            return
        self._emit(CheckpointVerified(step, time.monotonic() - begun))
        try:
            prune(self.root, self._config.keep, self._needed())
            for oldest in all_checkpoints(self.root)[:1]:
                self._on_kept(_read_state(oldest, read_manifest(oldest)))
        except OSError as error:
            if not (self._storage.patient and mendable(error)):
                raise
            self._emit(OldCheckpointsStay(reason(error, self.root)))


def checkpoint_directory(root: Path, step: int) -> Path:
    """Returns where the checkpoint after `step` training steps lives."""
    return root / f"step_{step:08d}"


@dataclass(frozen=True, slots=True)
class Resumable:
    """A checkpoint to go on from, and what it says: the manifest, the run's state, and the configuration that made it.

    `config`: as `config.load.dump_config` wrote it, read back; None in checkpoints of earlier releases.
    `in_memory`: it is a copy that the trainer has taken already; no checkpoint is read, `checkpoint` is where these are, and of
    the manifest there are the scheduler's steps.
    """

    checkpoint: Path
    state: RunState
    manifest: dict[str, Any]
    config: dict[str, Any] | None
    in_memory: bool = False

    @property
    def where(self) -> str:
        """Returns what it is called in events."""
        return "memory" if self.in_memory else str(self.checkpoint)


def refuse_earlier(run_dir: Path) -> None:
    """Raise InputError where `run_dir` holds an earlier run: a new one may not mix its own with what that one wrote."""
    found, metrics = all_checkpoints(run_dir / "checkpoints"), run_dir / "metrics.jsonl"
    what = f"checkpoints of an earlier run, up to {found[-1].name}" if found else "the metrics of an earlier run"
    if found or (metrics.is_file() and metrics.stat().st_size):
        raise InputError(
            f"{run_dir} holds {what}: go on from it with --resume{'' if found else ' auto'}, choose another run_dir, or delete "
            "that directory"
        )


def newest_or_none(root: Path, emit: Emit) -> Resumable | None:
    """Returns the newest checkpoint in `root` that a run can go on from, None where there is none; sets damaged ones aside.

    Raises CheckpointError for one that holds no run or was written by another release.
    """
    while found := all_checkpoints(root):
        try:
            return read_resumable(found[-1])
        except DamagedCheckpoint as damage:
            _set_aside(found[-1], damage, emit)
    return None


def newest(root: Path, steps: int, emit: Emit) -> Resumable:
    """Returns the newest checkpoint in `root` that a run of `steps` training steps can go on from; sets damaged ones aside.

    Raises InputError where there is none, or where nothing is left to train, and CheckpointError for one that holds no run or
    was written by another release. The trainer's own files are compared by `restore`.
    """
    found = newest_or_none(root, emit)
    if found is None:
        raise InputError(f"--resume: no checkpoint in {root}; start without --resume, and set checkpoint.every to save some")
    done = found.state.step
    if done >= steps:
        raise InputError(
            f"--resume: {found.checkpoint} already has {done} of train.steps={steps} steps; raise train.steps to go on"
        )
    return found


def newest_until(root: Path, step: int) -> Path | None:
    """Returns the newest checkpoint of `step` or an earlier one that counts."""
    return next((path for path in reversed(verified_checkpoints(root)) if step_of(path) <= step), None)


def steps_in(root: Path) -> list[int]:
    """Returns the steps whose checkpoints in `root` count."""
    return [step_of(path) for path in verified_checkpoints(root)]


def leave_after(root: Path, step: int) -> None:
    """Rename the checkpoints of later steps than `step`: they count no more, and are kept. Raises StorageError."""
    for path in all_checkpoints(root):
        if step_of(path) > step:
            with storing(path):
                set_aside(path, LEFT_COURSE)


async def restore(trainer: Trainer, chosen: Resumable, emit: Emit) -> Resumable:
    """Load `chosen` into the trainer; returns it, or the one before where its ranks find it damaged.

    Damaged ones are set aside. Raises CheckpointError where none is left.
    """
    if chosen.in_memory:
        return chosen
    found: Resumable | None = chosen
    while found is not None:
        try:
            await trainer.load(found.checkpoint)
        except DamagedCheckpoint as damage:
            _set_aside(found.checkpoint, damage, emit)
            found = newest_or_none(chosen.checkpoint.parent, emit)
        else:
            return found
    root = chosen.checkpoint.parent
    raise CheckpointError(f"no checkpoint in {root} is as it was written; the damaged ones were set aside there")


def read_resumable(checkpoint: Path) -> Resumable:
    """Returns a checkpoint with the driver's part of it; the model's description in it is as it was written, too.

    Raises DamagedCheckpoint where one of these is not as it was written, CheckpointError where it holds no such part, or one
    that makes no sense.
    """
    manifest = read_manifest(checkpoint)
    state = _read_state(checkpoint, manifest)
    verify_files(checkpoint, manifest, [name for name in manifest["files"] if name == CONFIG or name.startswith(f"{MODEL}/")])
    config = (checkpoint / CONFIG).read_text(encoding="utf-8") if CONFIG in manifest["files"] else "null"
    return Resumable(checkpoint, state, manifest, yaml.safe_load(config))


def _read_state(checkpoint: Path, manifest: dict[str, Any]) -> RunState:
    if RUN not in manifest["files"]:
        raise CheckpointError(f"{checkpoint}: it holds no {RUN}, so no run can go on from it; it may be one of weights only.")
    verify_files(checkpoint, manifest, [RUN])
    state = RunState.parse(json.loads((checkpoint / RUN).read_text(encoding="utf-8")), str(checkpoint / RUN))
    if state.step != step_of(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: its {RUN} is the state after step {state.step}; the directory must have been renamed."
        )
    return state


def _set_aside(damaged: Path, damage: DamagedCheckpoint, emit: Emit) -> None:
    aside = set_aside(damaged)
    before = all_checkpoints(damaged.parent)
    emit(CheckpointDamaged(str(damage), str(aside), str(before[-1]) if before else None))
