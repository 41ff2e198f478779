"""What a node can find out by itself. Nothing here waits for another node."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import psutil

from ctpo_megatron.slurm.preflight.report import Finding, State

GIB = 2**30
LEAST_MEMORY_GIB = 2.0  # below it not even a toy model's processes come up
IMPORTS = {  # what servers and trainer ranks load first, and as they do: on a CPU without what is slow and of no use there
    "SGLang": "from ctpo_megatron.engine.sglang.entry import load; load()",
    "Megatron": "from ctpo_megatron.mcore.host import prepare_host; prepare_host(); import megatron.core.transformer",
}
# What a run's numbers depend on. The rest of an environment may differ in what only one kind of node has.
PACKAGES = (
    "ctpo_megatron",
    "torch",
    "sglang",
    "megatron-core",
    "ray",
    "transformers",
    "transformer-engine",
    "numpy",
    "safetensors",
)


class Imports:
    """Starts at once, in processes of their own, what is looked at last: it takes the longest."""

    def __init__(self, statements: Mapping[str, str] = IMPORTS) -> None:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self._begun = time.monotonic()
        self._processes = {
            name: subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], text=True, **quiet)  # type: ignore[call-overload]
            for name, code in statements.items()
        }

    def findings(self, timeout_s: float) -> list[Finding]:
        """Returns whether each can be imported, after at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        return [self._finding(name, process, deadline) for name, process in self._processes.items()]

    def _finding(self, name: str, process: subprocess.Popen[str], deadline: float) -> Finding:
        topic = f"import {name}"
        try:
            _, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            waited = time.monotonic() - self._begun
            return Finding(
                topic=topic, state="bad", found=f"not done in {waited:.0f} s", meaning="the file system or the node is slow"
            )
        if process.returncode == 0:
            return Finding(topic=topic, state="ok", found="yes")
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Finding(topic=topic, state="bad", found="no", meaning=last[:300])


def memory() -> Finding:
    """Returns the memory that processes may still use here: less than the host's where a control group limits the job."""
    free = min([psutil.virtual_memory().available, *_group_room()]) / GIB
    state: State = "ok" if free >= LEAST_MEMORY_GIB else "bad"
    meaning = "" if state == "ok" else "too little for a trainer rank or a server; ask for more with `sbatch: [--mem=...]`"
    return Finding(topic="free memory", state=state, found=f"{free:.1f} GiB", meaning=meaning)


def shared_memory(on_gpus: bool, path: Path = Path("/dev/shm")) -> Finding:
    """Returns the room for Ray's objects and NCCL's buffers."""
    wanted = 32.0 if on_gpus else 1.0
    if not path.is_dir():
        return Finding(
            topic=str(path), state="bad" if on_gpus else "note", found="missing", meaning="NCCL and Ray keep data there"
        )
    free = shutil.disk_usage(path).free / GIB
    if free >= wanted:
        return Finding(topic=str(path), state="ok", found=f"{free:.1f} GiB free")
    meaning = (
        f"less than {wanted:.0f} GiB: Ray puts objects on the disk, which is slow; is it another job's, or a container's limit?"
    )
    return Finding(topic=str(path), state="note", found=f"{free:.1f} GiB free", meaning=meaning)


def inputs(paths: Iterable[str]) -> Finding:
    """Returns whether all that the run reads can be read here."""
    named = [path for path in paths if path]
    missing = [path for path in named if not os.access(path, os.R_OK)]
    if not missing:
        return Finding(topic="model and data", state="ok", found=f"{len(named)} paths readable")
    meaning = "every node must see them at the same path: a shared file system, or a mount of the container"
    return Finding(topic="model and data", state="bad", found=f"not readable: {', '.join(missing)}", meaning=meaning)


def versions(names: Iterable[str] = PACKAGES) -> str:
    """Returns `name==version` of the packages, and a hash of this one's own source: a checkout's version says little."""
    found = [f"python=={sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"]
    for name in names:
        try:
            found.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name}==none")
    return " ".join([*found, f"source=={_own_source()}"])


def _own_source() -> str:
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _group_room() -> list[int]:
    """Returns what the control groups of this process leave it, in bytes; nothing where none limits it."""
    room, root = [], Path("/sys/fs/cgroup")
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        return []
    for place in (Path(group), *Path(group).parents):
        with contextlib.suppress(OSError, ValueError):  # "max", or none here
            limit, used = ((root / place / name).read_text() for name in ("memory.max", "memory.current"))
            room.append(int(limit) - int(used))
    return room
