"""Checkpoints for tests: begun by one rank for all, looked at from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ctpo_megatron.checkpoints.files import VERSION, begin_checkpoint, commit_checkpoint, verified_checkpoints
from ctpo_megatron.checkpoints.hashes import file_hash
from ctpo_megatron.loop.state import RunState

PART = '{"step": 2, "seen": [1, 2]}\n'  # what stands for the driver's part of a checkpoint


def begin_together(target: Path, part: str = PART) -> None:
    """Begin the checkpoint `target` on rank 0, with a run.json; the other ranks wait."""
    from ctpo_megatron.mcore.collective import on_first_rank

    on_first_rank(lambda: begin_checkpoint(target, {"run.json": part}), f"{target} cannot be begun")


def newest_name(root: Path) -> str | None:
    """The name of the verified checkpoint with the highest step."""
    found = verified_checkpoints(root)
    return found[-1].name if found else None


def state_after(step: int) -> RunState:
    """A state that a run could have."""
    return RunState(step, groups=4 * step, cursor={"epoch": 0, "position": 4 * step}, accuracies={0: 0.25, step: 0.5})


def write_checkpoint(
    root: Path,
    step: int,
    state: RunState | None = None,
    *,
    resolved: str | None = None,
    model: Path | None = None,
    optimizer_steps: int = 4,
) -> Path:
    """A checkpoint as it looks to all but the ranks: their part is one file of five bytes.

    `resolved`: the configuration in it, `model`: whose description is in it.
    """
    target = root / f"step_{step:08d}"
    parts = {"run.json": json.dumps((state or state_after(step)).dump())}
    work = begin_checkpoint(target, parts if resolved is None else parts | {"config.yaml": resolved})
    (work / "random").mkdir()
    (work / "random" / "rank_00000.pt").write_bytes(b"12345")
    if model is not None:
        (work / "model").mkdir()
        for file in model.glob("*.json"):
            shutil.copy(file, work / "model")
    found = [path for path in sorted(work.rglob("*")) if path.is_file()]
    files = {path.relative_to(work).as_posix(): {"size": path.stat().st_size, "digest": file_hash(path)} for path in found}
    header = {"version": VERSION, "world_size": 1, "dtype": "float32", "scheduler_steps": optimizer_steps}
    commit_checkpoint(work, target, header | {"files": files})
    return target
