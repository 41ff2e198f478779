"""What this machine has and lacks for a run: the content of `ctpo doctor`.

Each check returns rows and never raises for what it looks for: a missing part is a row. `bad` means that no run can work here,
`note` that something is absent which only some runs need.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

DISTRIBUTION = "ctpo_megatron"
OLDEST_PYTHON = (3, 11)
GIB = 2**30
COMMAND_TIMEOUT_S = 20.0
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
TORCH_QUERY = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"
CONFINED_TRUE = ("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true")


@dataclass(frozen=True, slots=True)
class Row:
    """One finding: what was looked at, what was found, and what it means for a run."""

    topic: str
    state: Literal["ok", "note", "bad"]
    found: str
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings and the sum of them."""

    rows: list[Row]
    verdict: str

    @property
    def exit_code(self) -> int:
        """0 when runs can work here, otherwise 1."""
        return int(any(row.state == "bad" for row in self.rows))


def diagnose(run_dir: Path = Path(".")) -> Diagnosis:
    """Look at packages, devices, sandbox, SLURM, memory and disk. Takes seconds; starts nothing that stays."""
    gpus = gpu_rows()
    rows = [
        python_row(),
        *package_rows(requirements()),
        *gpus,
        *extra_rows(has_gpu=gpus[0].state == "ok"),
        sandbox_row(),
        slurm_row(),
        *host_rows(run_dir),
    ]
    return Diagnosis(rows, verdict(rows))


def verdict(rows: Iterable[Row]) -> str:
    """One sentence in plain words."""
    rows = list(rows)
    bad = [row.topic for row in rows if row.state == "bad"]
    if bad:
        return f"Runs will not work here until this is mended: {', '.join(bad)}."
    on_gpu = any(row.topic == "GPUs" and row.state == "ok" for row in rows)
    where = "GPUs (nccl)" if on_gpu else "the CPU (gloo, float32, SGLang's CPU platform), which suits small models and tests"
    return f"Ready. cluster.device=auto will run on {where}."


def python_row() -> Row:
    """The interpreter."""
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    fits = sys.version_info >= OLDEST_PYTHON
    return Row("Python", "ok", found) if fits else Row("Python", "bad", found, "3.11 or newer is needed")


def requirements() -> list[str]:
    """What the installed package says it needs; itself, where it is not installed."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [DISTRIBUTION]


def package_rows(requirements: Iterable[str]) -> list[Row]:
    """Installed versions against requirement strings as in setup.py; those of extras are left out."""
    rows = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = str(requirement.specifier) or "any version"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            rows.append(Row(requirement.name, "bad", "not installed", f"needed: {wanted}; run `make install`"))
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        meaning = "" if fits else f"needed: {wanted}; run `make install`"
        rows.append(Row(requirement.name, "ok" if fits else "bad", found, meaning))
    return rows


def gpu_rows() -> list[Row]:
    """GPUs that the driver reports, and whether torch can use them."""
    listed = _output(GPU_QUERY)
    if not listed:
        return [Row("GPUs", "note", "none", "device cpu: gloo, float32, SGLang's CPU platform; GPU-only options do nothing")]
    names = listed.splitlines()
    found = f"{len(names)}: {'; '.join(dict.fromkeys(names))}"
    usable = _output((sys.executable, "-c", TORCH_QUERY), timeout_s=120.0)
    count, _, version = (usable or "0 none").partition(" ")
    if int(count) == 0:
        return [Row("GPUs", "bad", found, "torch sees none: the driver is too old for this torch, or torch is a CPU build")]
    return [Row("GPUs", "ok", found), Row("torch CUDA", "ok", f"{version}, {count} usable")]


def extra_rows(*, has_gpu: bool) -> list[Row]:
    """TransformerEngine and NVIDIA's apex, which only GPU hosts use."""
    rows = []
    engine = _version("transformer-engine") or _version("transformer_engine")
    if engine is not None:
        rows.append(Row("TransformerEngine", "ok", engine))
    else:
        meaning = "slower layers without it; `pip install .[gpu]`" if has_gpu else "used on GPUs only"
        rows.append(Row("TransformerEngine", "note", "not installed", meaning))
    if importlib.util.find_spec("apex") is None:
        meaning = "optional; see setup.py for how to build it" if has_gpu else "used on GPUs only"
        rows.append(Row("NVIDIA apex", "note", "not installed", meaning))
    elif importlib.util.find_spec("amp_C") is None and importlib.util.find_spec("fused_layer_norm_cuda") is None:
        meaning = "PyPI's `apex` is another project and breaks Megatron-Core: `pip uninstall apex`"
        rows.append(Row("NVIDIA apex", "bad", "a package named apex without NVIDIA's kernels", meaning))
    else:
        rows.append(Row("NVIDIA apex", "ok", _version("apex") or "installed"))
    return rows


def sandbox_row() -> Row:
    """Whether bubblewrap can confine the model's code here."""
    if shutil.which("bwrap") is None:
        return Row("bubblewrap", "note", "not installed", "rollout.tool.type=python needs it; install the package `bubblewrap`")
    if _output(CONFINED_TRUE) is None:
        meaning = "rollout.tool.type=python cannot run; this kernel or container forbids user namespaces"
        return Row("bubblewrap", "note", "installed, but cannot confine", meaning)
    return Row("bubblewrap", "ok", (_output(("bwrap", "--version")) or "usable").removeprefix("bubblewrap "))


def slurm_row() -> Row:
    """SLURM's commands and whether a controller answers."""
    if shutil.which("sbatch") is None:
        return Row("SLURM", "note", "no sbatch", "one-machine runs need none")
    if _output(("sinfo", "--noheader")) is None:
        return Row("SLURM", "note", "commands without a controller", "`ctpo slurm` can write job files, but sbatch fails here")
    return Row("SLURM", "ok", (_output(("sbatch", "--version")) or "usable").removeprefix("slurm-wlm ").removeprefix("slurm "))


def host_rows(run_dir: Path) -> list[Row]:
    """CPUs, memory, shared memory, disk and file descriptors."""
    cpus = len(os.sched_getaffinity(0))
    memory = _available_memory() / GIB
    disk = shutil.disk_usage(_existing(run_dir)).free / GIB
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        _at_least("CPUs", cpus, 2, f"{cpus}", "processes will wait for each other; expect time-outs"),
        _at_least("free memory", memory, 8, f"{memory:.1f} GiB", "a trainer and one server need about 8 GiB before the model"),
        _shared_memory_row(),
        _at_least("free disk", disk, 10, f"{disk:.1f} GiB at {run_dir}", "checkpoints may not fit"),
        _at_least("open files", files, 4096, f"limit {files}", "Ray needs many: `ulimit -n 65536`"),
    ]


def as_table(diagnosis: Diagnosis) -> Table:
    """The rows for a terminal; print the verdict below it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in diagnosis.rows:
        colour = {"ok": "green", "note": "yellow", "bad": "bold red"}[row.state]
        table.add_row(f"[{colour}]{row.state}[/]", row.topic, escape(row.found), escape(row.meaning))
    return table


def _shared_memory_row() -> Row:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Row("/dev/shm", "note", "missing", "Ray keeps objects on disk instead, which is slow")
    usage = shutil.disk_usage(path)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    return _at_least("/dev/shm", usage.free / GIB, 2, found, "Ray's object store lives there; give a container --shm-size=8g")


def _at_least(topic: str, value: float, wanted: float, found: str, meaning: str) -> Row:
    return Row(topic, "ok", found) if value >= wanted else Row(topic, "note", found, meaning)


def _available_memory() -> float:
    """Bytes a new process may use: what the kernel calls available, or less where a cgroup limits it."""
    line = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(line.group(1)) * 1024 if line else 0
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def _existing(path: Path) -> Path:
    """`path` or its nearest parent that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(command: tuple[str, ...], timeout_s: float | None = None) -> str | None:
    """What `command` printed; None when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s or COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
