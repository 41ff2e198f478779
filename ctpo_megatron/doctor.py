"""What this machine has and lacks for a run: the content of `ctpo doctor`.

Each check returns rows and never raises for what it looks for: a missing part is a row. `bad` means that no run can work here,
`note` that something is absent which only some runs need.
"""

from __future__ import annotations

import importlib.util
import math
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
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.engine import toolkit
from ctpo_megatron.environment import TRAINER, Reader, check_environment, environment_of, variables
from ctpo_megatron.errors import InputError
from ctpo_megatron.rollout.sandbox import CASES, escapes, sandbox_available

DISTRIBUTION = "ctpo_megatron"
OLDEST_PYTHON = (3, 11)
GIB = 2**30
COMMAND_TIMEOUT_S = 20.0
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
TORCH_QUERY = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"
OLDEST_DRIVER = {12: 525, 13: 580}  # by the major version of torch's CUDA
ENGINE_IMPORT = "import transformer_engine.pytorch"
IMPORT_TIMEOUT_S = 180.0


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
    """Look at packages, devices, sandbox, SLURM, memory, disk and variables. Takes seconds; starts nothing that stays."""
    gpus = gpu_rows()
    has_gpu, torch_cuda = gpus[0].state == "ok", toolkit.torch_cuda()
    rows = [
        python_row(),
        *package_rows(requirements()),
        *gpus,
        *([] if gpus[0].state == "note" else [driver_row(torch_cuda)]),
        *(toolkit_rows(torch_cuda) if has_gpu else []),
        *extra_rows(has_gpu=has_gpu),
        sandbox_row(),
        slurm_row(),
        *host_rows(run_dir, has_gpu=has_gpu),
        *environment_rows("cuda" if has_gpu else "cpu"),
    ]
    return Diagnosis(rows, verdict(rows))


def doctor_job() -> int:
    """Print all findings and the verdict; returns the command's exit code."""
    found = diagnose()
    Console().print(as_table(found))
    print(found.verdict)
    return found.exit_code


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


def driver_row(torch_cuda: str) -> Row:
    """NVIDIA's driver against the CUDA of this torch."""
    version = (_output(DRIVER_QUERY) or "").partition("\n")[0].strip()
    oldest = OLDEST_DRIVER.get(toolkit.version_of(torch_cuda)[0])
    major = version.partition(".")[0]
    if oldest is None or not major.isdigit() or int(major) >= oldest:
        return Row("NVIDIA driver", "ok", version or "unknown")
    meaning = f"torch's CUDA {torch_cuda} wants {oldest} or newer; without it only NVIDIA's cuda-compat package may help"
    return Row("NVIDIA driver", "note", version, meaning)


def toolkit_rows(torch_cuda: str) -> list[Row]:
    """What servers on GPUs compile their kernels with, where SGLang looks for it."""
    found = toolkit.parts(torch_cuda)
    return [Row(part.name, "bad" if part.remedy else "ok", part.found, part.remedy) for part in found]


def extra_rows(*, has_gpu: bool) -> list[Row]:
    """TransformerEngine and NVIDIA's apex, which only GPU hosts use."""
    rows = [transformer_engine_row(has_gpu=has_gpu)]
    if importlib.util.find_spec("apex") is None:
        meaning = "not needed beside TransformerEngine" if has_gpu else "used on GPUs only"
        rows.append(Row("NVIDIA apex", "note", "not installed", meaning))
    elif importlib.util.find_spec("amp_C") is None and importlib.util.find_spec("fused_layer_norm_cuda") is None:
        meaning = "PyPI's `apex` is another project and breaks Megatron-Core: `pip uninstall apex`"
        rows.append(Row("NVIDIA apex", "bad", "a package named apex without NVIDIA's kernels", meaning))
    else:
        rows.append(Row("NVIDIA apex", "ok", _version("apex") or "installed"))
    return rows


def transformer_engine_row(*, has_gpu: bool) -> Row:
    """TransformerEngine, and on GPUs whether it loads: one that was built for another torch does not, and hides it."""
    topic, version = "TransformerEngine", _version("transformer-engine")
    if importlib.util.find_spec("transformer_engine") is None:
        meaning = "slower layers without it; `make install-gpu`" if has_gpu else "used on GPUs only"
        return Row(topic, "note", "not installed", meaning)
    problem = _failure((sys.executable, "-c", ENGINE_IMPORT), IMPORT_TIMEOUT_S) if has_gpu else None
    if problem is not None:
        meaning = "build it against this torch with `make install-gpu`, or remove it to train with slower layers"
        return Row(topic, "bad", f"{version or 'installed'}, does not load: {problem}", meaning)
    return Row(topic, "ok", version or "installed")


def environment_rows(device: str) -> list[Row]:
    """The variables that processes of a run on `device` are given, with the values that they would get from this shell."""
    readers: tuple[Reader, ...] = ("trainer", "server")
    given = {reader: environment_of(reader, device, os.environ) for reader in readers}
    known = {each.name: each for reader in readers for each in variables(reader, device)}
    rows = []
    for each in known.values():
        to = "trainer and servers" if len(each.readers) > 1 else "trainer" if each.readers == TRAINER else "servers"
        value = given[each.readers[0]].get(each.name)
        found = "set aside: PYTORCH_ALLOC_CONF is set" if value is None else value
        rows.append(Row(each.name, "ok", f"{found} ({to})", each.why))
    try:
        check_environment(os.environ, device)
    except InputError as error:
        rows.append(Row("environment", "bad", "a value that a run cannot work with", str(error)))
    return rows


def sandbox_row() -> Row:
    """Whether bubblewrap can confine the model's code here, and whether its confinement holds against the escape test."""
    if shutil.which("bwrap") is None:
        return Row("bubblewrap", "note", "not installed", "rollout.tool.type=python needs it; install the package `bubblewrap`")
    reason = sandbox_available()
    if reason is not None:
        return Row("bubblewrap", "note", "installed, but cannot confine", f"rollout.tool.type=python cannot run: {reason}")
    found = escapes(PythonTool())
    if found:
        meaning = "rollout.tool.type=python refuses to start: what a program must not do is possible here"
        return Row("bubblewrap", "note", f"does not hold: {'; '.join(map(str, found))}", meaning)
    version = (_output(("bwrap", "--version")) or "usable").removeprefix("bubblewrap ")
    return Row("bubblewrap", "ok", version, f"holds against the escape test: {', '.join(CASES)}")


def slurm_row() -> Row:
    """SLURM's commands and whether a controller answers."""
    if shutil.which("sbatch") is None:
        return Row("SLURM", "note", "no sbatch", "one-machine runs need none")
    if _output(("sinfo", "--noheader")) is None:
        return Row("SLURM", "note", "commands without a controller", "`ctpo slurm` can write job files, but sbatch fails here")
    return Row("SLURM", "ok", (_output(("sbatch", "--version")) or "usable").removeprefix("slurm-wlm ").removeprefix("slurm "))


def host_rows(run_dir: Path, *, has_gpu: bool = False) -> list[Row]:
    """CPUs, memory, shared memory, disk and limits. Runs on GPUs want more of some."""
    cpus = len(os.sched_getaffinity(0))
    memory = _available_memory() / GIB
    disk = shutil.disk_usage(_existing(run_dir)).free / GIB
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        _at_least("CPUs", cpus, 2, f"{cpus}", "processes will wait for each other; expect time-outs"),
        _at_least("free memory", memory, 8, f"{memory:.1f} GiB", "a trainer and one server need about 8 GiB before the model"),
        _shared_memory_row(32 if has_gpu else 2),
        _at_least("free disk", disk, 10, f"{disk:.1f} GiB at {run_dir}", "checkpoints may not fit"),
        _at_least("open files", _limit(files), 65536 if has_gpu else 4096, f"limit {files}", "Ray needs many: `ulimit -n 65536`"),
        *([_locked_memory_row()] if has_gpu else []),
    ]


def as_table(diagnosis: Diagnosis) -> Table:
    """The rows for a terminal; print the verdict below it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in diagnosis.rows:
        colour = {"ok": "green", "note": "yellow", "bad": "bold red"}[row.state]
        table.add_row(f"[{colour}]{row.state}[/]", row.topic, escape(row.found), escape(row.meaning))
    return table


def _locked_memory_row() -> Row:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"limit {limit // 1024} KiB"
    meaning = "NCCL registers memory with InfiniBand: `ulimit -l unlimited`; give a container --ulimit memlock=-1"
    return _at_least("locked memory", _limit(limit), math.inf, found, meaning)


def _limit(value: int) -> float:
    return math.inf if value == resource.RLIM_INFINITY else value


def _shared_memory_row(wanted_gib: int) -> Row:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Row("/dev/shm", "note", "missing", "Ray keeps objects on disk instead, which is slow")
    usage = shutil.disk_usage(path)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    meaning = f"Ray's object store and NCCL live there; give a container --shm-size={max(8, wanted_gib)}g"
    return _at_least("/dev/shm", usage.free / GIB, wanted_gib, found, meaning)


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


def _failure(command: tuple[str, ...], timeout_s: float) -> str | None:
    """The last line of the errors that `command` printed; None when it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _output(command: tuple[str, ...], timeout_s: float | None = None) -> str | None:
    """What `command` printed; None when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s or COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
