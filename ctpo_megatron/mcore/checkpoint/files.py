"""Checkpoints as directories: which are complete, which is newest, which may go. Needs neither torch nor megatron.

A checkpoint is a directory step_00000012 with

    checkpoint.json   written last: the caller's state, the schedule's place, and the size of every other file
    random/           random states, one file per rank
    everything else   megatron.core.dist_checkpointing
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.directories import TEMPORARY_SUFFIX, publish_directory

MANIFEST = "checkpoint.json"
VERSION = 1
STEP_NAME = re.compile(r"step_(\d{8,})")


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in `root`, or None."""
    complete = _checkpoints(Path(root))
    return complete[-1] if complete else None


def prune(root: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints in `root`, and what interrupted writes left. One process calls it.

    Raises ValueError when `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but must be at least 1.")
    root = Path(root)
    for old in _checkpoints(root)[:-keep]:
        doomed = old.with_name(old.name + TEMPORARY_SUFFIX)  # so that a half-deleted one does not count either
        old.rename(doomed)
    for leftover in root.glob(f"step_*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover)


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """Content of checkpoint.json (keys version, world_size, scheduler_steps, state, files), after comparing all sizes.

    Raises CheckpointError when the checkpoint is missing, incomplete or of another version.
    """
    checkpoint = Path(checkpoint)
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"has no {MANIFEST}, so it was never finished" if checkpoint.is_dir() else "does not exist"
        raise CheckpointError(f"{checkpoint}: the checkpoint {what}.") from error
    except ValueError as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: not valid JSON: {error}.") from error
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{checkpoint}: format version {manifest.get('version')}; this release reads version {VERSION}.")
    for name, size in manifest["files"].items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            have = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{file}: {have}, but {size} bytes were written. Delete {checkpoint} to go on from an older one."
            )
    return manifest


def publish_checkpoint(work: Path, target: Path, header: dict[str, Any]) -> None:
    """Write the manifest of a finished checkpoint and give it its name."""
    sizes = {str(file.relative_to(work)): file.stat().st_size for file in sorted(work.rglob("*")) if file.is_file()}
    (work / MANIFEST).write_text(json.dumps({**header, "files": sizes}, indent=1) + "\n", encoding="utf-8")
    publish_directory(work, target)


def _checkpoints(root: Path) -> list[Path]:
    """Complete ones, by step."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
