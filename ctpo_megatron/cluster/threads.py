"""How many threads a trainer rank computes with, and on which cores."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import InputError

PCI_DEVICES = Path("/sys/bus/pci/devices")


def set_threads(count: int) -> None:
    """Let torch and OpenMP compute with `count` threads in this process. To be called before its first tensor is made."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor: large pages for buckets of weights
    import torch

    torch.set_num_threads(count)


def threads_per_rank(ranks: int, cores: int | None = None) -> int:
    """An equal share of `cores`, by default all CPUs of this machine, for each of `ranks` processes, at least one thread."""
    return max(1, (cores or os.cpu_count() or 1) // ranks)


def check_gpus(given: list[str]) -> None:
    """Raises InputError where this process sees other GPUs than those that Ray has `given` to it: ranks would meet on one."""
    import torch

    if (seen := torch.cuda.device_count()) != len(given):
        raise InputError(
            f"this trainer rank was given the GPUs {given} and sees {seen}: CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r} here; start Ray without RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES, "
            "and do not set CUDA_VISIBLE_DEVICES for its workers"
        )


def cores_of_gpu(devices: Path = PCI_DEVICES) -> set[int]:
    """The cores on the same NUMA node as this process's GPU; empty where the system does not tell."""
    import torch

    gpu: Any = torch.cuda.get_device_properties(0)  # torch's stubs lack its place on the PCI bus
    return cores_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0", devices)


def cores_near(device: str, devices: Path = PCI_DEVICES) -> set[int]:
    """The cores that the system calls local to a PCI device, 0000:1b:00.0 for example; empty where it does not tell."""
    try:
        text = (devices / device / "local_cpulist").read_text()
    except OSError:
        return set()
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):  # 0-31,64-95
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def bind_to_cores(cores: set[int]) -> set[int]:
    """Returns `cores`, on which alone all threads of this process, and those that they start, run from now on.

    Nothing changes where it is empty.
    """
    if cores:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cores)
    return cores
