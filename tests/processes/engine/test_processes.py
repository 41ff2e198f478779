"""Process groups: who is in one, what it has mapped, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpo_megatron.engine.processes import end_group, group_members, group_shared_memory, reap_group
from ctpo_megatron.mcore.hf.shared_memory import Mapped, handle_of, new_shared

FAMILY = """
import mmap, os, sys, time
with open(sys.argv[1], "wb+") as file:
    file.write(b"x" * 4096)
    file.flush()
    memory = mmap.mmap(file.fileno(), 4096)
if os.fork() == 0:  # lives as long as its parent
    time.sleep(60)
if os.fork() == 0:  # a zombie: its parent does not look
    os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""


MAPS = """
import sys, time
from ctpo_megatron.mcore.hf.shared_memory import Handle, Mapped, handle_of, new_shared

manager, name, size = sys.argv[1:]
theirs, own = Mapped().at(Handle(manager, name, int(size))), new_shared(64)
print(handle_of(own).name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path(f"/dev/shm/ctpo_test_{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def test_a_group_and_its_end(segment: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", FAMILY, segment], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 10
        while len(members := group_members(process.pid)) != 2 and time.monotonic() < deadline:  # until the zombie is one
            time.sleep(0.02)
        assert len(members) == 2
        assert process.pid in members
        assert os.getpid() not in members
        assert group_shared_memory(process.pid) == {str(segment)}
        assert end_group(process.pid) == []
        assert group_members(process.pid) == []
        assert not segment.exists()
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
    reap_group(process.pid)


def test_memory_that_another_process_shares_with_a_group_stays() -> None:
    """As a colocated sender's bucket, which a server has mapped when it is ended: the next server is given it again."""
    memory = new_shared(64)
    assert memory is not None
    handle = handle_of(memory)
    assert handle is not None
    words = [sys.executable, "-c", MAPS, handle.manager, handle.name, str(handle.nbytes)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True, text=True) as process:
        assert process.stdout is not None
        own = process.stdout.readline().strip()
        assert group_shared_memory(process.pid) == {f"/dev/shm{own}"}
        assert end_group(process.pid) == []
        reap_group(process.pid)
    assert not Path(f"/dev/shm{own}").exists()
    assert Mapped().at(handle).nbytes == 64


def test_a_group_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait(10)
    assert (group_members(process.pid), group_shared_memory(process.pid), end_group(process.pid)) == ([], set(), [])
