"""Writes the dump of a step that was not applied (`data.dumps`), and lets old ones go.

A dump appears complete or not at all. Its weights are hard links to a verified checkpoint of the very same weights where there is
one on the same file system, which costs nothing and outlives the checkpoint; otherwise the ranks save them alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import ctpo_megatron
from ctpo_megatron.batch import Abandoned, TrainBatch
from ctpo_megatron.checkpoints.directories import TEMPORARY_SUFFIX, complete_directory, temporary_directory
from ctpo_megatron.checkpoints.files import begin_checkpoint
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.data.dumps import CONFIG, WEIGHTS, About, write_about, write_batch
from ctpo_megatron.errors import storing
from ctpo_megatron.loop.checkpoints import Checkpoints, checkpoint_directory
from ctpo_megatron.loop.protocols import Trainer

DUMP_NAME = re.compile(r"step_\d{8,}(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Written:
    """A dump on the disk, and what it added to it."""

    path: Path
    bytes: int


class StepDumps:
    """The dumps of one run in `root`, at most `train.nonfinite_dumps` of them. `config`: as the user gave it."""

    def __init__(self, trainer: Trainer, root: Path, config: RunConfig, checkpoints: Checkpoints | None = None) -> None:
        self.root = root
        self._trainer, self._config, self._checkpoints = trainer, config, checkpoints
        self._unmoved: Path | None = None  # a dump whose weights are those that the trainer has now

    def moved(self) -> None:
        """The weights are no longer those of the dump before."""
        self._unmoved = None

    async def write(self, update: Abandoned, batches: list[TrainBatch], *, step: int, supervised: bool = False) -> Written:
        """Dump the optimizer step at which `update` was abandoned, of training step `step`, from 1.

        Raises StorageError or CheckpointError, and leaves nothing behind, where that fails.
        """
        if self._checkpoints is not None:
            await self._checkpoints.settle()  # the ranks have one save in flight at most
        number, several = update.number(batches), len(batches) > 1
        target = self.root / f"step_{step:08d}{f'.{number + 1}' if several else ''}"
        with storing(target):
            self.root.mkdir(exist_ok=True)  # without those above it: the run's directory may be away
            work = await asyncio.to_thread(temporary_directory, target)
        try:
            with storing(target):
                weights_from = await self._weights(work, update, step)
                about = self._about(update, batches, step, weights_from, supervised)
                await asyncio.to_thread(self._files, work, batches[number], update, about)
                size = await asyncio.to_thread(_own_bytes, work)
                await asyncio.to_thread(complete_directory, work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self._unmoved = target
        with contextlib.suppress(OSError):  # what does not go now goes next time
            await asyncio.to_thread(prune_dumps, self.root, self._config.train.nonfinite_dumps)
        return Written(target, size)

    def _files(self, work: Path, batch: TrainBatch, update: Abandoned, about: About) -> None:
        write_batch(work, batch, update.anchors)
        (work / CONFIG).write_text(dump_config(self._config), encoding="utf-8")
        write_about(work, about)

    def _about(self, update: Abandoned, batches: list[TrainBatch], step: int, weights_from: str, supervised: bool) -> About:
        return About(
            kind="supervised" if supervised else "policy",
            step=step,
            optimizer_step=update.number(batches) + 1,
            optimizer_steps=len(batches),
            applied=update.applied,
            reason=update.reason,
            sequence=update.sequence,
            policy_version=step - 1,
            temperature=1.0 if supervised else self._config.rollout.temperature,
            parallel=self._config.parallel.model_dump(),
            written=round(time.time(), 3),
            release=ctpo_megatron.__version__,
            weights_from=weights_from,
            files={},
        )

    async def _weights(self, work: Path, update: Abandoned, step: int) -> str:
        """Put the trainer's present weights into the dump; returns where they come from."""
        for source in self._of_the_same_weights(update, step):
            if await asyncio.to_thread(_linked, source, work / WEIGHTS):
                return f"{source}, by hard links"
        await asyncio.to_thread(begin_checkpoint, work / WEIGHTS, {})
        await self._trainer.save_weights(work / WEIGHTS)
        return "the trainer's ranks"

    def _of_the_same_weights(self, update: Abandoned, step: int) -> list[Path]:
        """Verified checkpoints that hold what the trainer has now: none where optimizer steps of this update were applied."""
        if update.applied:
            return []
        found = [] if self._unmoved is None else [self._unmoved / WEIGHTS]
        if self._checkpoints is not None:
            found.append(checkpoint_directory(self._checkpoints.root, step - 1))
        return [path for path in found if path.is_dir()]


def all_dumps(root: Path) -> list[Path]:
    """Returns the finished dumps in `root`, the oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if DUMP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def prune_dumps(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` dumps, and what interrupted writes left."""
    dumps = all_dumps(root)
    doomed = [*dumps[: max(len(dumps) - keep, 0)], *root.glob(f"step_*{TEMPORARY_SUFFIX}")]
    for path in doomed:
        if path.name.endswith(TEMPORARY_SUFFIX):
            shutil.rmtree(path, ignore_errors=True)
            continue
        going = path.with_name(path.name + TEMPORARY_SUFFIX)  # so that a half-deleted one is none
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _linked(source: Path, target: Path) -> bool:
    """Whether `target` now has all files of `source`, as further names of the same; nothing is there where it has not."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):  # another file system, or one without links
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def _own_bytes(directory: Path) -> int:
    """Returns the bytes of the files that have no other name than the one in `directory`."""
    stats = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum(found.st_size for found in stats if found.st_nlink == 1)
