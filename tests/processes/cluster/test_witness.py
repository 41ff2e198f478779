"""What the system says of processes that are stopped, spin or wait, and their stacks, with real children."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ctpo_megatron.cluster.watch import witness
from ctpo_megatron.cluster.watch.witness import Turns, Witness, dump, turns, waited
from ctpo_megatron.record.stalls import STARVED, Condition

SPIN = "def spin():\n print('up', flush=True)\n while True: pass\nspin()"
WAIT = "import sys\ndef wait_for_input(): sys.stdin.read()\nprint('up', flush=True)\nwait_for_input()"
LOGGED = """
import sys, pathlib
from ctpo_megatron.cluster.logs import redirect_output
redirect_output(pathlib.Path(sys.argv[1]))
def spin():
    print("up", flush=True)
    while True: pass
spin()
"""
SOON_S = 20.0  # on a busy machine

Child = Callable[..., psutil.Process]


@pytest.fixture
def child() -> Iterator[Child]:
    """Starts Python processes that have said `up`, and ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str, *words: str, says: bool = True) -> psutil.Process:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        if says:
            assert process.stdout.readline() == b"up\n"
        return psutil.Process(process.pid)

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def until(process: psutil.Process, is_it: Callable[[Condition], bool], looks: Witness | None = None) -> Condition:
    looks, deadline = looks or Witness(), time.monotonic() + SOON_S
    while True:
        seen = looks.look({process.pid: 0})[process.pid]
        if is_it(seen):
            return seen
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)


def test_one_that_is_stopped_is_seen_at_every_look_until_it_goes_on(child: Child) -> None:
    process, looks = child(WAIT), Witness()
    process.suspend()
    seen = until(process, lambda each: each.state == psutil.STATUS_STOPPED and each.looks >= 3, looks)
    assert 0 < seen.since_s < SOON_S
    looks.forget()
    assert looks.look({process.pid: 0})[process.pid].looks == 1
    process.resume()
    until(process, lambda each: each.state == psutil.STATUS_SLEEPING, looks)


def test_one_that_spins_is_told_from_one_that_waits(child: Child) -> None:
    until(child(SPIN), lambda each: each.cpus > 0.05 and each.looks > 1 and each.state == psutil.STATUS_RUNNING)
    waiting = until(child(WAIT), lambda each: each.looks > 1)
    assert waiting.state == psutil.STATUS_SLEEPING
    assert waiting.cpus < 0.05


def test_one_that_starves_is_told_from_one_that_spins_and_from_one_that_waits(child: Child) -> None:
    """On one processor, where one of them has priority; both would compute all the time."""
    (core, *_) = os.sched_getaffinity(0)
    starving, greedy, waiting = child(SPIN), child(SPIN), child(WAIT)
    for process in (starving, greedy):
        process.cpu_affinity([core])
    starving.nice(19)
    seen = until(starving, lambda each: each.waited is not None and each.waited >= STARVED)
    assert seen.state == psutil.STATUS_RUNNING
    assert seen.cpus < 0.5
    asleep = until(waiting, lambda each: each.waited is not None)
    assert asleep.waited < 0.2
    starving.kill()
    freed = until(greedy, lambda each: each.waited is not None and each.cpus > 0.05)
    assert freed.waited < 1.0


def test_a_thread_that_has_had_no_turn_has_waited_throughout() -> None:
    """Its wait is counted only when it ends, which may be after many looks."""
    before = Turns(7, 1.0, 2.0)
    assert waited(before, before, 1.0, wants=True) == 1.0
    assert waited(before, before, 1.0, wants=False) == 0.0
    assert waited(before, Turns(7, 1.5, 2.25), 1.0, wants=True) == 0.25
    assert waited(before, Turns(7, 1.0, 9.0), 1.0, wants=False) == 1.0  # the one that has ended
    assert waited(before, Turns(8, 1.5, 2.5), 1.0, wants=True) is None  # another thread works now
    assert waited(None, before, 1.0, wants=True) is None


@pytest.mark.parametrize("said", ["0 0 0\n", "not this\n", None])
def test_a_system_that_does_not_count_turns_is_believed(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_path: Path) -> str:
        if said is None:
            raise FileNotFoundError
        return said

    monkeypatch.setattr(Path, "read_text", read)
    assert turns(1, 1) is None


def test_one_that_is_gone_is_left_out(child: Child) -> None:
    process, looks = child(WAIT), Witness()
    assert process.pid in looks.look({process.pid: 0})
    looks.kill(process.pid)
    process.wait(SOON_S)
    assert looks.look({process.pid: 0}) == {}
    looks.kill(process.pid)


def test_stacks_of_one_that_is_stopped_while_it_spins(child: Child) -> None:
    process = child(SPIN)
    process.suspend()
    until(process, lambda each: each.state == psutil.STATUS_STOPPED)
    found = Witness().stacks({process.pid: ""})[process.pid]
    if "no stacks: " in found and "ermission" in found:
        pytest.skip("this system lets nobody read the memory of other processes")
    assert "spin (<string>:" in found
    assert process.status() == psutil.STATUS_STOPPED  # it was not let go on


def test_stacks_come_from_the_process_itself_where_nobody_may_read_them(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "_spy", lambda: "/bin/false")
    log = tmp_path / "log"
    process = child(LOGGED, str(log), says=False)
    deadline = time.monotonic() + SOON_S
    while not (log.exists() and "up" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert " in spin" in dump(process.pid, str(log))
    assert process.is_running()
    assert dump(process.pid).startswith("no stacks: ")


def test_without_py_spy_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "_spy", lambda: None)
    assert dump(1) == "no stacks: py-spy is not installed"
