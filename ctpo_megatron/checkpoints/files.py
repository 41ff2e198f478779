"""Checkpoints as directories: which are verified, which is newest, which may go. Needs neither torch nor megatron.

A checkpoint is a directory step_00000012 with

    checkpoint.json   the manifest: the schedule's place, size and hash of every other file
    run.json          the driver's part: how far the run is; missing where only weights are kept
    config.yaml       the driver's part: the configuration that made it, resolved; missing in those of earlier releases
    shards.json       which tensor lies where in which file, and the hash of it as its rank held it
    model/            config.json and the tokenizer of the model
    random/           random states, one file per rank
    everything else   megatron.core.dist_checkpointing, format torch_dist

It gets this name only after everything in it was read back and compared, so a directory of that name is a verified one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.checkpoints.directories import TEMPORARY_SUFFIX, complete_directory, temporary_directory
from ctpo_megatron.checkpoints.hashes import text_hash
from ctpo_megatron.errors import CheckpointError, DamagedCheckpoint, storing

MANIFEST = "checkpoint.json"
RUN = "run.json"
CONFIG = "config.yaml"
SHARDS = "shards.json"
MODEL = "model"
VERSION = 3
STEP_NAME = re.compile(r"step_(\d{8,})")


def all_checkpoints(root: str | Path) -> list[Path]:
    """Returns the checkpoints in `root` by step, oldest first: each was verified when it got its name, and may be damaged now."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if STEP_NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the training step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def verified_checkpoints(root: str | Path) -> list[Path]:
    """Returns those whose manifest is as it was written and whose files have the sizes that it names, the oldest first."""
    return [path for path in all_checkpoints(root) if _has_its_sizes(path)]


def set_aside(checkpoint: Path, suffix: str = ".damaged") -> Path:
    """Rename a checkpoint, so that it does not count any more and can still be looked at. Returns its new path."""
    aside, number = checkpoint.with_name(checkpoint.name + suffix), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}{suffix}{number}")
    checkpoint.rename(aside)
    return aside


def prune(root: str | Path, keep: int, needed: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` verified checkpoints in `root`, and what interrupted writes left. One process calls it.

    Those of the steps in `needed` stay.
    One whose files have lost their sizes neither counts nor goes: `set_aside` is for those. Raises ValueError when `keep` is
    less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but must be at least 1.")
    root = Path(root)
    for old in verified_checkpoints(root)[:-keep]:
        if step_of(old) in needed:
            continue
        doomed = old.with_name(old.name + TEMPORARY_SUFFIX)  # so that a half-deleted one does not count either
        old.rename(doomed)
    for leftover in root.glob(f"step_*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover)


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """Returns the content of checkpoint.json, after comparing the sizes of all files.

    Keys: version, world_size, dtype, scheduler_steps, weights (hash of the model's shards), files (name -> `size` and the hash,
    `digest`); where adapters were trained also adapter (its settings) and base (path and digest of the model it belongs to);
    where a critic was, value_head (true).
    Raises DamagedCheckpoint for what is not as it was written, CheckpointError for a checkpoint that is not there or has another
    version.
    """
    checkpoint = Path(checkpoint)
    manifest = _read(checkpoint)
    for name, file in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != file["size"]:
            have = "is missing" if found is None else f"has {found} bytes"
            raise DamagedCheckpoint(f"{path}: {have}, but {file['size']} bytes were written.")
    return manifest


def begin_checkpoint(target: Path, parts: Mapping[str, str]) -> Path:
    """Make the directory in which the checkpoint `target` will be written, and put files with the texts `parts` into it.

    Returns that directory, `work_directory(target)`. One process begins a checkpoint; then the ranks write their parts
    into it, and the manifest names all files that are there. Raises StorageError.
    """
    with storing(target):
        work = temporary_directory(target)
        for name, text in parts.items():
            (work / name).write_text(text, encoding="utf-8")
    return work


def work_directory(target: Path) -> Path:
    """Returns where the checkpoint `target` is written before it gets its name."""
    return target.with_name(target.name + TEMPORARY_SUFFIX)


def commit_checkpoint(work: Path, target: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a verified checkpoint and give it its name. `content` is the manifest without its own hash."""
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings
    text = json.dumps({**content, "digest": _own_hash(content)}, indent=1)
    (work / MANIFEST).write_text(text + "\n", encoding="utf-8")
    complete_directory(work, target)


def _read(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint}: the checkpoint does not exist.") from error
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} is missing; nothing without it counts as a checkpoint.") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{file}: not valid JSON: {error}.") from error
    if not isinstance(manifest, dict) or "digest" not in manifest:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise _other_version(checkpoint, version)
        raise DamagedCheckpoint(f"{file}: not a checkpoint's manifest.")
    if manifest.pop("digest") != _own_hash(manifest):
        raise DamagedCheckpoint(f"{file}: its content does not have the hash that was written.")
    if manifest.get("version") != VERSION:
        raise _other_version(checkpoint, manifest.get("version"))
    return manifest


def _other_version(checkpoint: Path, version: object) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint}: format version {version}; this release reads version {VERSION}. Go on with the release that wrote it."
    )


def _own_hash(content: dict[str, Any]) -> str:
    return text_hash(json.dumps(content, sort_keys=True))


def _has_its_sizes(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True
