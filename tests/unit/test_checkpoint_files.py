"""Which checkpoints count, which is newest, and which go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.checkpoint.files import latest_checkpoint, prune, publish_checkpoint, read_manifest
from ctpo_megatron.mcore.directories import publish_directory, temporary_directory

HEADER = {"version": 1, "world_size": 1, "scheduler_steps": 4, "state": {"step": 2}}


def write_checkpoint(root: Path, step: int) -> Path:
    target = root / f"step_{step:08d}"
    work = temporary_directory(target)
    (work / "random").mkdir()
    (work / "random" / "rank_00000.pt").write_bytes(b"12345")
    publish_checkpoint(work, target, HEADER)
    return target


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_newest_complete_one_counts(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 9)
    newest = write_checkpoint(tmp_path, 100_000_000)  # sorted as a number, not as text
    write_checkpoint(tmp_path, 12)
    temporary_directory(tmp_path / "step_99999999")
    (tmp_path / "step_99999998").mkdir()
    (tmp_path / "step_best").mkdir()
    assert latest_checkpoint(tmp_path) == newest
    assert read_manifest(newest) == HEADER | {"files": {"random/rank_00000.pt": 5}}


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    temporary_directory(tmp_path / "step_00000005")
    (tmp_path / "notes").mkdir()
    prune(tmp_path, 2)
    assert names(tmp_path) == ["notes", "step_00000003", "step_00000004"]
    prune(tmp_path, 5)
    assert names(tmp_path) == ["notes", "step_00000003", "step_00000004"]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    file = checkpoint / "random" / "rank_00000.pt"
    file.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="has 4 bytes, but 5 bytes were written"):
        read_manifest(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing, but 5 bytes"):
        read_manifest(checkpoint)
    (checkpoint / "checkpoint.json").write_text(json.dumps(HEADER | {"version": 7}))
    with pytest.raises(CheckpointError, match="format version 7; this release reads version 1"):
        read_manifest(checkpoint)
    (checkpoint / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_manifest(checkpoint)


def test_publishing_replaces_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        work = temporary_directory(target)
        (work / content).write_text(content)
        publish_directory(work, target)
    assert names(tmp_path) == ["model"]
    assert names(target) == ["new"]
    (temporary_directory(target) / "half").write_text("")
    assert names(temporary_directory(target)) == []  # a second attempt begins empty
