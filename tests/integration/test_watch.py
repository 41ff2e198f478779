"""Processes of a real run that are stopped or spin: found in bounded time, named in the report, and ended."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from leftovers import left_in_shared_memory, living, shared_memory

from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.runs import END_S, START_S, Started, check_stopped

STOPPED_S = 10.0  # from the signal to the event: cluster.watch.stopped_s is 4 s, a look a second, and a machine that is busy
FLOOR_S, USUAL_S = 5.0, 10.0  # of a stage's silence: the floor of these runs, and more than any stage is usually silent
SPIN_S = 3 * USUAL_S + 10.0  # the promise

# In every Python process of a run: once the file is there, the next forward pass of the trainer rank of that number never ends.
SPIN = """
import os, sys, threading, time

def wait(path):
    while not os.path.exists(path):
        time.sleep(0.2)
    step = sys.modules.get("ctpo_megatron.mcore.step")
    if step is not None and "trainer_1.log" in os.readlink("/proc/self/fd/1"):
        def spin(*_):
            while True:
                pass
        step._forward_step = spin

threading.Thread(target=wait, args=({path!r},), daemon=True).start()
"""

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("watch")
    task = make_toy_task(root / "data", seed=1, train_rows=256, eval_rows=16, sft_rows=16)
    model = make_toy_model(root / "model", "qwen3", seed=1, init_std=0.2)
    return (f"data.train={task.train}", f"data.eval={task.eval}", f"model.path={model}")


def start(inputs: tuple[str, ...], run_dir: Path) -> Started:
    """A long run of two ranks and one server."""
    sizes = ("parallel.tp=2", "parallel.cp=1", "train.steps=500", "train.prompts_per_step=16", "rollout.group_size=8")
    others = ("eval.prompts=4", "checkpoint.every=0", "optimizer.weight_decay=0.1", f"cluster.watch.floor_s={FLOOR_S}")
    return Started("train", "dense_tp2_cp2.yaml", run_dir, *inputs, *sizes, *others)


def found(run: Started, is_it: Callable[[psutil.Process], bool]) -> psutil.Process:
    """The process of the run that it is; fails when there is none for long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for each in run.descendants():
            try:
                if is_it(each):
                    return each
            except (psutil.Error, OSError):  # it has just ended
                continue
        time.sleep(0.01)
    raise AssertionError(f"no such process:\n{run.text}")


def is_rank(process: psutil.Process, number: int) -> bool:
    return Path(os.readlink(f"/proc/{process.pid}/fd/1")).name == f"trainer_{number}.log"


def title(process: psutil.Process) -> str:
    return (process.cmdline() or [""])[0]


def stop(process: psutil.Process) -> float:
    os.kill(process.pid, signal.SIGSTOP)
    return time.time()


def stall(run: Started, since: float, **fields: object) -> tuple[dict, str, float]:
    """The event of a stall with these `fields`, its report, and how long it took to find."""
    event = run.wait_for_event("stall", **fields)
    report, deadline = Path(event["report"]), time.monotonic() + 60.0
    while not report.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seconds = event["time"] - since
    print(f"{event['kind']}: found after {seconds:.1f} s: {event['verdict']}")
    return event, report.read_text(), seconds


def test_what_is_stopped_or_spins_is_found_named_and_replaced(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that is stopped, then a rank, then a rank that spins, which is told from the one that waits for it.

    Then Ctrl-C, which lets the run stop in order, and a second one, which ends it at once.
    """
    planted, file, shm = tmp_path / "planted", tmp_path / "spin", shared_memory()
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(SPIN.format(path=str(file)))
    monkeypatch.setenv("PYTHONPATH", f"{planted}:{os.environ.get('PYTHONPATH', '')}")
    run = start(inputs, tmp_path / "run")
    try:
        run.wait_for_event("step", step=1)
        everybody = run.descendants()
        a_scheduler_is_stopped(run)
        a_rank_is_stopped(run)
        everybody += run.descendants()
        a_rank_spins(run, file)
        everybody += run.descendants()
        run.interrupt(signal.SIGINT)
        run.wait_for_event("stop requested")
        run.interrupt(signal.SIGINT)
        ended = run.finish(END_S)
    finally:
        run.end()
    check_stopped(ended, signal.SIGINT, times=2, code=130)
    assert len(ended.happened("server lost")) == 1, "the servers were not touched by what the ranks did"
    assert "trainer rank 1 shows no progress" in ended.output
    assert living(everybody) == []
    assert left_in_shared_memory(shm) == set()


def a_scheduler_is_stopped(run: Started) -> None:
    scheduler = found(run, lambda each: title(each).startswith("sglang::scheduler"))
    event, report, seconds = stall(run, stop(scheduler), culprits=["inference server 0: scheduler"])
    assert (event["kind"], event["acts"]) == ("stopped", True)
    assert event["culprits"] == ["inference server 0: scheduler"]
    assert seconds < STOPPED_S
    assert f"| inference server 0: scheduler | {scheduler.pid} |" in report
    assert "event_loop" in report  # its stack, although it is stopped
    assert "is stopped (SIGSTOP)" in run.wait_for_event("server lost")["reason"]
    back = run.wait_for_event("server restarted")["time"]
    run.wait_for_event("server serving")
    steps_on(run)
    print(f"it is back {back - event['time']:.1f} s after that")
    assert not scheduler.is_running()


def a_rank_is_stopped(run: Started) -> None:
    rank = found(run, lambda each: is_rank(each, 1) and title(each).endswith(".update"))
    event, report, seconds = stall(run, stop(rank), culprits=["trainer rank 1"])
    assert (event["kind"], event["culprits"]) == ("stopped", ["trainer rank 1"])
    assert seconds < STOPPED_S
    heard = r"(; last heard in [^;]+)?"  # it is asked every two seconds, and has begun since then
    assert re.search(rf"trainer rank 1 is stopped \(SIGSTOP\) for \d+ s{heard}; trainer rank 0 waits", event["verdict"])
    assert re.search(r"trainer rank 0 waits in \w+ \(group .+, call \d+\) for trainer rank 1", event["verdict"])
    assert "trainer rank 1:\n\n```\nProcess" in report  # py-spy's
    assert "gloo:" in report  # the flight recorder's
    assert "trainer rank 1 is stopped" in run.wait_for_event("trainer restarting")["reason"]
    step = run.wait_for_event("trainer restarted")["step"]
    run.wait_for_event("step", step=step + 2)


def a_rank_spins(run: Started, file: Path) -> None:
    """While `file` is there. The run may tell before that it is slow."""
    begun = time.time()
    steps_on(run)
    file.touch()
    event, report, seconds = stall(run, time.time(), kind="hung")
    file.unlink()
    run.wait_for_event("trainer restarted", after=begun)
    assert (event["kind"], event["culprits"]) == ("hung", ["trainer rank 1"])
    assert seconds < SPIN_S
    # on a busy host others may have the processors
    assert re.search("it spins|starves: it waits for a processor", event["verdict"])
    assert re.search(r"trainer rank 0 waits in \w+ \(group .+, call \d+\) for trainer rank 1", event["verdict"])
    assert "in spin" in report  # where it spins, from its own stack


def steps_on(run: Started) -> None:
    """Until two more steps are done."""
    step = max(each["step"] for each in run.happened("step"))
    run.wait_for_event("step", step=step + 2)
