"""A driver whose event loop freezes, whose interpreter is held, or which is stopped, ends and says why. With real children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctpo_megatron.cluster.watch import guard
from ctpo_megatron.cluster.watch.loop_watch import FROZEN
from tests.support.patience import eventually

DRIVER = """
import asyncio, ctypes, re, signal, subprocess, sys, time
from pathlib import Path
from ctpo_megatron.cluster.watch import guard, loop_watch
from ctpo_megatron.record.heartbeat import Stages

stages = Stages()

def freeze():
    time.sleep(600)

def hold():  # the interpreter is not let go
    ctypes.PyDLL(None).sleep(600)

def wait_for_other():  # as ray.put waits for a raylet
    other.send_signal(signal.SIGSTOP)
    print(other.wait(), flush=True)

other = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # they are read to their end

async def main():
    watch = loop_watch.LoopWatch(float(sys.argv[3]), Path(sys.argv[1]), stages.now)
    watch.start()
    watch.end_stopped({"the other": other.pid}, 0.5)
    with stages("train", step=7):
        await asyncio.sleep(0.5)
        print("up", flush=True)
        await asyncio.sleep(0.5)
        {"freeze": freeze, "hold": hold, "wait": wait_for_other, "live": lambda: None}[sys.argv[2]]()
        await asyncio.sleep(float(sys.argv[4]))
    other.kill()
    lag = watch.lag_s()
    watch.close()
    print(f"lag {lag:.3f}", flush=True)

asyncio.run(main())
"""
END_S = 60.0  # on a busy machine


def begin(run_dir: Path, how: str, *, frozen_s: float = 2.0, lasts_s: float = 600.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", DRIVER, str(run_dir), how, str(frozen_s), str(lasts_s)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_a_loop_that_waits_for_a_stopped_process_of_ray_is_freed(tmp_path: Path) -> None:
    process = begin(tmp_path, "wait", frozen_s=END_S, lasts_s=0.0)
    output, errors = process.communicate(timeout=END_S)
    assert process.returncode == 0, errors
    assert output.splitlines()[0] == str(-signal.SIGKILL)
    assert "the other is stopped (SIGSTOP)" in errors


def test_a_frozen_loop_ends_the_process_with_its_own_exit_code(tmp_path: Path) -> None:
    process = begin(tmp_path, "freeze")
    _, errors = process.communicate(timeout=END_S)
    assert process.returncode == FROZEN
    assert "error: the driver's event loop is frozen for" in errors
    report = (tmp_path / "stalls" / "001.md").read_text()
    assert "in freeze" in report
    assert "train of step 7" in report


def test_a_loop_that_lives_is_left_alone(tmp_path: Path) -> None:
    process = begin(tmp_path, "live", frozen_s=2.0, lasts_s=4.0)
    said, errors = process.communicate(timeout=END_S)
    assert (process.returncode, errors) == (0, "")
    assert float(said.split()[-1]) < 2.0
    assert not (tmp_path / "stalls").exists()


@pytest.fixture
def quick_guard(tmp_path: Path) -> Callable[[int, float], subprocess.Popen[bytes]]:
    """A guard that loses its patience after a second instead of ten."""

    def begin_guard(pid: int, frozen_s: float) -> subprocess.Popen[bytes]:
        code = "from ctpo_megatron.cluster.watch import guard; import sys, pathlib; guard.STOPPED_S = guard.GONE_WITHIN_S = 1.0; "
        code += "guard.main(int(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3]))"
        words = [sys.executable, "-c", code, str(pid), str(frozen_s), str(tmp_path)]
        return subprocess.Popen(words, stdin=subprocess.PIPE, bufsize=0)

    return begin_guard


def test_a_driver_that_is_stopped_or_silent_is_ended_from_outside(
    tmp_path: Path, quick_guard: Callable[[int, float], subprocess.Popen[bytes]]
) -> None:
    """Two drivers at once: one is stopped, the other one's interpreter is held, so that it sends nothing."""
    stopped, held = begin(tmp_path, "live", frozen_s=600.0), begin(tmp_path, "hold", frozen_s=600.0)
    os.kill(stopped.pid, signal.SIGSTOP)
    guards = [quick_guard(stopped.pid, 600.0), quick_guard(held.pid, 1.0)]
    try:
        for process in (stopped, held):
            process.communicate(timeout=END_S)
            assert process.returncode == -signal.SIGKILL
        assert [each.wait(END_S) for each in guards] == [0, 0]
    finally:
        for each in (stopped, held, *guards):
            each.kill()
    reports = [path.read_text() for path in sorted((tmp_path / "stalls").glob("*.md"))]
    assert any("# The driver is stopped (SIGSTOP)" in each for each in reports)
    assert any("# The driver's interpreter is held" in each and "hold" in each for each in reports)


def ignores(pid: int, number: int) -> bool:
    """Whether a process has chosen to ignore a signal, which a new one has not."""
    (mask,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_the_guard_ends_with_the_driver_and_not_at_ctrl_c(quick_guard: Callable[[int, float], subprocess.Popen[bytes]]) -> None:
    started = quick_guard(os.getpid(), 600.0)
    assert started.stdin is not None
    started.stdin.write(b".")
    assert eventually(lambda: ignores(started.pid, signal.SIGINT), END_S)
    started.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert started.poll() is None
    started.stdin.close()
    assert started.wait(END_S) == 0


def test_a_process_that_is_gone_has_no_state() -> None:
    assert guard.state_of(os.getpid()) in ("R", "S")
    assert guard.state_of(1 << 22) == ""
