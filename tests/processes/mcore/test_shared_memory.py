"""Memory that ranks of a host share: another process writes into it, and torch's helper keeps no socket of theirs open."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.hf.shared_memory import Handle, Mapped, domain, handle_of, new_shared

# Prints how many sockets of this process torch's helper has, after its first shared memory was made as argv[1] says.
SOCKETS = """
import contextlib, os, sys
import psutil, torch.distributed as dist
from torch import UntypedStorage
from ctpo_megatron.mcore.hf.shared_memory import new_shared

def sockets(pid):
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {each for each in found if each.startswith("socket:")}

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
memory = new_shared(64) if sys.argv[1] == "ours" else UntypedStorage._new_using_filename_cpu(64)
(helper,) = psutil.Process().children()
print(len(sockets(os.getpid()) & sockets(helper.pid)))
"""
WRITES = """
import sys
from ctpo_megatron.mcore.hf.shared_memory import Handle, Mapped, domain

manager, name, size, there = sys.argv[1:]
memory = Mapped().at(Handle(manager, name, int(size)))
memory[3] = 7
print(domain() == there)
"""


def printed(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_process_of_the_host_writes_into_it() -> None:
    memory = new_shared(1000)
    assert memory is not None
    memory.zero_()
    handle = handle_of(memory[10:20])
    assert handle is not None
    assert printed(WRITES, handle.manager, handle.name, str(handle.nbytes), domain()) == "True"
    assert memory.nonzero().flatten().tolist() == [3]


def test_what_is_not_shared_has_no_handle_and_what_is_gone_cannot_be_mapped() -> None:
    assert handle_of(torch.zeros(3)) is None
    memory = new_shared(1000)
    assert memory is not None
    handle = handle_of(memory)
    assert handle is not None
    with pytest.raises(WeightSyncError, match="cannot be mapped"):
        Mapped().at(Handle(handle.manager, "/torch_1_1_1", 1000))


def test_more_than_there_is_room_for_is_not_taken() -> None:
    assert new_shared(2**50) is None


@pytest.mark.parametrize(("maker", "inherited"), [("ours", False), ("torch's", True)])
def test_the_helper_inherits_no_socket(maker: str, inherited: bool) -> None:
    """Torch's own way still lets it. Once it does not, `start_helper` can go."""
    assert (int(printed(SOCKETS, maker)) > 0) == inherited
