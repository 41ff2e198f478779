"""`ctpo checkpoint verify`: are checkpoints still what was written?"""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.checkpoints.files import MANIFEST, STEP_NAME, all_checkpoints
from ctpo_megatron.checkpoints.verify import verify_checkpoint
from ctpo_megatron.errors import CheckpointError, InputError


def verify_checkpoints(directory: Path) -> None:
    """Print a line for the checkpoint `directory`, or for each one in it; raises CheckpointError when one is damaged."""
    is_one = (directory / MANIFEST).is_file() or STEP_NAME.fullmatch(directory.name)
    found = [directory] if is_one else all_checkpoints(directory)
    if not found:
        raise InputError(f"{directory}: neither a checkpoint (no {MANIFEST}) nor a directory that holds step_*")
    damaged = 0
    for checkpoint in found:
        try:
            files = verify_checkpoint(checkpoint)["files"]
            size = sum(file["size"] for file in files.values())
            print(f"{checkpoint}: good, {len(files)} files, {size} bytes", flush=True)
        except CheckpointError as error:
            damaged += 1
            print(f"{checkpoint}: DAMAGED: {error}", flush=True)
    if damaged:
        raise CheckpointError(f"{damaged} of {len(found)} checkpoints in {directory} cannot be used")
