"""Which checkpoints count, which is newest, which go, and whether damage is found wherever it lies."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from ctpo_megatron.checkpoints.directories import complete_directory, temporary_directory
from ctpo_megatron.checkpoints.files import begin_checkpoint, commit_checkpoint, prune, read_manifest
from ctpo_megatron.checkpoints.metadata import read_metadata
from ctpo_megatron.checkpoints.verify import verify_checkpoint
from ctpo_megatron.errors import CheckpointError, DamagedCheckpoint, InputError
from ctpo_megatron.jobs.checkpoints import verify_checkpoints
from tests.support.checkpoints import newest_name, write_checkpoint


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_newest_complete_one_counts(tmp_path: Path) -> None:
    assert newest_name(tmp_path / "absent") is None
    assert newest_name(tmp_path) is None
    write_checkpoint(tmp_path, 9)
    newest = write_checkpoint(tmp_path, 100_000_000)  # sorted as a number, not as text
    write_checkpoint(tmp_path, 12)
    temporary_directory(tmp_path / "step_99999999")
    (tmp_path / "step_99999998").mkdir()
    (tmp_path / "step_best").mkdir()
    assert newest_name(tmp_path) == newest.name
    manifest = verify_checkpoint(newest)
    assert manifest["files"].keys() == {"random/rank_00000.pt", "run.json"}
    assert manifest["scheduler_steps"] == 4
    (newest / "random" / "rank_00000.pt").write_bytes(b"1")
    assert newest_name(tmp_path) == "step_00000012"


def test_pruning_keeps_the_newest_that_are_whole_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(tmp_path, step)
    temporary_directory(tmp_path / "step_00000006")
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_00000005" / "random" / "rank_00000.pt").unlink()  # does not count as one of the two
    prune(tmp_path, 2)
    assert names(tmp_path) == ["notes", "step_00000003", "step_00000004", "step_00000005"]
    flip(tmp_path / "step_00000004" / "checkpoint.json", 40)
    prune(tmp_path, 1)
    assert names(tmp_path) == ["notes", "step_00000003", "step_00000004", "step_00000005"]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_pruning_leaves_what_is_needed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, 1, {2, 9})
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    file, manifest = checkpoint / "random" / "rank_00000.pt", checkpoint / "checkpoint.json"
    file.write_bytes(b"1234")
    with pytest.raises(DamagedCheckpoint, match="has 4 bytes, but 5 bytes were written"):
        read_manifest(checkpoint)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing, but 5 bytes"):
        read_manifest(checkpoint)
    manifest.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint\.json is missing"):
        read_manifest(checkpoint)
    manifest.write_text(json.dumps({"version": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="format version 1; this release reads version 3"):
        read_manifest(checkpoint)


def test_a_checkpoint_of_the_last_format_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    target = tmp_path / "step_00000002"
    commit_checkpoint(begin_checkpoint(target, {}), target, {"version": 2, "state": {"step": 2}, "files": {}})
    with pytest.raises(CheckpointError, match="format version 2; this release reads version 3") as caught:
        read_manifest(target)
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.thorough
def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    for file in (checkpoint / "checkpoint.json", checkpoint / "random" / "rank_00000.pt", checkpoint / "run.json"):
        whole = file.read_bytes()
        for place in range(len(whole)):
            flip(file, place)
            with pytest.raises(CheckpointError):
                verify_checkpoint(checkpoint)
            file.write_bytes(whole)
    verify_checkpoint(checkpoint)


def test_verify_command_tells_all_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="neither a checkpoint"):
        verify_checkpoints(tmp_path)
    first, second = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    verify_checkpoints(tmp_path)
    verify_checkpoints(second)
    flip(second / "random" / "rank_00000.pt", 0)
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="1 of 2 checkpoints"):
        verify_checkpoints(tmp_path)
    good, damaged = capsys.readouterr().out.splitlines()
    assert good.startswith(f"{first}: good, 2 files, ")
    assert damaged.startswith(f"{second}: DAMAGED:")
    assert "rank_00000.pt" in damaged


def test_a_complete_directory_replaces_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        work = temporary_directory(target)
        (work / content).write_text(content)
        complete_directory(work, target)
    assert names(tmp_path) == ["model"]
    assert names(target) == ["new"]
    (temporary_directory(target) / "half").write_text("")
    assert names(temporary_directory(target)) == []  # a second attempt begins empty


class Foreign:
    """What a hostile index would hold."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("never"),))


def test_the_index_may_hold_nothing_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Foreign()), b"no pickle", b""):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match="not the index"):
            read_metadata(tmp_path)
    assert names(tmp_path) == [".metadata"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_a_finished_directory_have_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes to a temporary file of its owner and renames it: a colleague could not read the model."""
    before = os.umask(umask)
    try:
        work = temporary_directory(tmp_path / "model")
        (work / "deep").mkdir()
        for file in (work / "model.safetensors", work / "deep" / "part"):
            file.touch(mode=0o600)
        complete_directory(work, tmp_path / "model")
    finally:
        os.umask(before)
    found = [file.stat().st_mode & 0o777 for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert found == [mode, mode]
