"""What a driver that dies leaves behind is ended by its guard, and nothing else is. With real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from leftovers import living

from ctpo_megatron.cluster.watch import guard

STAY = "import time; time.sleep(600)"  # as Ray's agents do
TIDY = "import sys, pathlib; sys.stdin.read(); pathlib.Path(sys.argv[1]).touch()"  # ends, in order, when it loses its parent
PARENT = (
    "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', *sys.argv[2:]], stdin=subprocess.PIPE).pid, "
)
PARENT += "flush=True); time.sleep(float(sys.argv[1]))"
# Its children: one that stays; one that is stopped and has a child that tidies up; one that ends early, and leaves a child.
DRIVER = f"""
import os, signal, subprocess, sys, time

directory, how = sys.argv[1:]
guard = "from ctpo_megatron.cluster.watch import guard; import pathlib, sys; "
guard += "guard.BY_THEMSELVES_S = guard.GONE_WITHIN_S = guard.TIDY_S = 1.0; "
guard += "guard.main(int(sys.argv[1]), 600.0, pathlib.Path(sys.argv[2]))"
python = [sys.executable, "-c"]
watch = subprocess.Popen([*python, guard, str(os.getpid()), directory], stdin=subprocess.PIPE, bufsize=0)
stay, tidy, parent = {STAY!r}, {TIDY!r}, {PARENT!r}
one = subprocess.Popen([*python, stay])
two = subprocess.Popen([*python, parent, "600", tidy, directory + "/tidied"], stdout=subprocess.PIPE)
three = subprocess.Popen([*python, parent, "1.0", stay], stdout=subprocess.PIPE)
pids = [watch.pid, one.pid, two.pid, *(int(each.stdout.readline()) for each in (two, three))]
while three.poll() is None:
    time.sleep(0.1)
    watch.stdin.write(b".")
two.send_signal(signal.SIGSTOP)
print(*pids, flush=True)
if how == "begins anew":
    os.execv(sys.executable, [*python, stay])
time.sleep(600)
"""
ENDS_WITHIN_S = 20.0


@pytest.mark.parametrize("how", ["is killed", "begins anew"])
def test_what_stays_below_a_dead_driver_is_ended(tmp_path: Path, how: str) -> None:
    """All of it, with a parent before its child; not a stranger of the same name, nor anything where the driver begins anew."""
    (tmp_path / "logs").mkdir()
    stranger = subprocess.Popen([sys.executable, "-c", STAY])
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    watch, *left = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    try:
        if how == "is killed":
            driver.kill()
            assert living([watch], ENDS_WITHIN_S) == []
            assert living(left, 0.0) == []
            assert (tmp_path / "tidied").exists()
            said = (tmp_path / "logs" / "guard.log").read_text()
            assert all(f"ended with SIGKILL: {left[number].pid} " in said for number in (0, 1, 3))
            assert str(left[2].pid) not in said  # it ended by itself
        else:
            deadline = time.monotonic() + ENDS_WITHIN_S
            while watch.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:  # what the driver became awaits nobody
                time.sleep(0.05)
            assert watch.status() == psutil.STATUS_ZOMBIE
            assert all(each.status() != psutil.STATUS_ZOMBIE for each in left)
            assert not (tmp_path / "logs" / "guard.log").exists()
        assert stranger.poll() is None
    finally:
        for process in (driver, stranger, *left):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.communicate()
        stranger.wait()


def test_a_look_that_a_busy_host_makes_slow_does_not_put_off_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes would not be known when the driver dies."""
    read = guard._fields

    def slowly(pid: int) -> list[str]:
        time.sleep(0.01)  # without a processor
        return read(pid)

    monkeypatch.setattr(guard, "_fields", slowly)
    child = subprocess.Popen([sys.executable, "-c", STAY])
    try:
        below, begun = guard.Below(os.getpid()), time.monotonic()
        below.look(now=True)
        lasted = time.monotonic() - begun
        assert child.pid in below._known
        assert below._next - time.monotonic() < min(guard.LONGEST_PAUSE_S, guard.LOOK_SHARE * lasted / 2)
    finally:
        child.kill()
        child.wait()
