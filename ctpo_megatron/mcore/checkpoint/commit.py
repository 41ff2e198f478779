"""The last step of a save, on rank 0: the checkpoint is compared with its predecessor, gets its manifest and its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctpo_megatron.checkpoints.files import (
    SHARDS,
    STEP_NAME,
    commit_checkpoint,
    read_manifest,
    step_of,
    verified_checkpoints,
)
from ctpo_megatron.checkpoints.hashes import file_hash, text_hash
from ctpo_megatron.checkpoints.metadata import read_metadata
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.checkpoint.rank_report import RankReport


def commit(
    work: Path, target: Path, header: dict[str, Any], reports: list[RankReport], weights: set[str], *, moved: bool
) -> None:
    """Name the checkpoint that all ranks have written and found again. Raises CheckpointError where the model has not moved."""
    shards = {name: stored for report in reports for name, stored in report.shards.items()}
    files = {name: file for report in reports for name, file in report.files.items()}
    weights_hash = _weights_hash(shards, weights)
    if moved:
        _refuse_stale(target, weights_hash)
    indexed = {info.relative_path for info in read_metadata(work).storage_data.values()}
    if indexed != shards.keys():
        raise CheckpointError(f"{work}: its index names other files than the ranks wrote: {sorted(indexed ^ shards.keys())}")
    (work / SHARDS).write_text(json.dumps(shards), encoding="utf-8")
    for path in sorted(work.rglob("*")):  # what no rank answers for: the index, the model's files
        name = path.relative_to(work).as_posix()
        if path.is_file() and name not in files:
            files[name] = {"size": path.stat().st_size, "digest": file_hash(path)}
    commit_checkpoint(work, target, {**header, "weights": weights_hash, "files": files})


def _weights_hash(shards: dict[str, list[list[Any]]], weights: set[str]) -> str:
    """Returns one hash for all shards of the model. It depends on how the layout cuts them, not on which rank wrote which."""
    found = sorted((key, offset or [], digest) for stored in shards.values() for key, offset, _, _, digest, *_ in stored)
    return text_hash(json.dumps([each for each in found if each[0] in weights]))


def _refuse_stale(target: Path, weights_hash: str) -> None:
    if not STEP_NAME.fullmatch(target.name):
        return
    before = [path for path in verified_checkpoints(target.parent) if step_of(path) < step_of(target)]
    if before and read_manifest(before[-1])["weights"] == weights_hash:
        raise CheckpointError(
            f"stale: its weights are those of {before[-1].name}, bit for bit, although optimizer steps with a gradient and a "
            "learning rate above 0 were made since. Either an old state was saved, or optimizer.lr is too small for the "
            "weights' number format to change"
        )
