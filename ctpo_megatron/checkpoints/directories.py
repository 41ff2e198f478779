"""Directories that appear complete or not at all: written under NAME.tmp, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
_REPLACED_SUFFIX = ".replaced" + TEMPORARY_SUFFIX


def temporary_directory(target: Path) -> Path:
    """Returns an empty TARGET.tmp beside `target`; what an earlier, interrupted write left there is removed."""
    work = target.with_name(target.name + TEMPORARY_SUFFIX)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def complete_directory(work: Path, target: Path) -> None:
    """Flush `work` to the disk and rename it to `target`, in place of what may be there. Both lie in the same directory.

    Files get the mode that the umask gives to new ones.
    """
    share_files(work)
    for file in work.rglob("*"):
        _flush(file)
    _flush(work)
    replaced = target.with_name(target.name + _REPLACED_SUFFIX)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    work.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def share_files(directory: Path) -> None:
    """Give all files in `directory`, made by this process, the mode that the umask gives to new ones.

    Some writers put a temporary file in place, which only its owner can read: safetensors does. The mode of the directory shows
    the umask, which a process with threads cannot ask for without setting it.
    """
    mode = directory.stat().st_mode & 0o666
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
