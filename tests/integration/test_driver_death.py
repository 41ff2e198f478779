"""A driver that is killed in a step while a rank of its trainer is stopped, in a job whose time limit comes near afterwards."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from leftovers import left_in_shared_memory, living, shared_memory

from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.runs import END_S, START_S, Started

ALL_END_S = 30.0
SQUEUE = "#!/bin/sh\ncat {answer}\n"  # in place of SLURM's: it says when the job began, or ends

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(600)]


def test_a_killed_driver_leaves_nothing_and_its_run_goes_on_until_the_time_limit_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed driver's actors and servers end by themselves, what is stopped by Ray or by the driver's guard.

    The same command goes on, and stops in order, since SLURM has moved the end of the job.
    """
    task = make_toy_task(tmp_path / "data", seed=1, train_rows=256, eval_rows=16, sft_rows=16)
    model = make_toy_model(tmp_path / "model", "qwen3", seed=1, init_std=0.2)
    answer, run_dir, begun = tmp_path / "ends", tmp_path / "run", int(time.time())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(SQUEUE.format(answer=answer))
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    answer.write_text(f"{begun + 86_400}\n")
    inputs = (f"data.train={task.train}", f"data.eval={task.eval}", f"model.path={model}", "eval.prompts=4", "train.steps=500")
    sizes = ("train.prompts_per_step=16", "rollout.group_size=8", "checkpoint.every=2", "optimizer.weight_decay=0.1")
    shm, everybody = shared_memory(), []
    try:
        run = Started("train", "quickstart.yaml", run_dir, *inputs, *sizes)
        run.wait_for_event("checkpoint verified")
        everybody = run.descendants()
        (guard,) = (each for each in everybody if "guard.py" in " ".join(each.cmdline()))
        rank = in_update(everybody)
        os.kill(rank.pid, signal.SIGSTOP)
        run.process.kill()
        killed = time.monotonic()
        assert guard.is_running(), "it looks after what is left"
        assert living(everybody, ALL_END_S) == []
        print(f"all {len(everybody)} processes were gone {time.monotonic() - killed:.1f} s after the driver")
        assert left_in_shared_memory(shm, ALL_END_S - time.monotonic() + killed) == set()
        log = run_dir / "logs" / "guard.log"  # of what the guard had to kill: the stopped rank, where Ray had no time to
        ended = log.read_text() if log.exists() else ""
        servers = ("engine.sglang.entry", "sglang::")  # not the process that keeps one company until it has ended
        assert not any(each in ended for each in servers), "a server is to end, and tidy up, by itself"
        assert [each["at"] for each in run.events if each["event"] == "job ends"] == [begun + 86_400]

        run = Started("train", "quickstart.yaml", run_dir, *inputs, *sizes, "--resume", "auto")
        run.wait_for_event("incarnation began", number=2)
        answer.write_text(f"{int(time.time()) + 60}\n")  # before the run is ready: then it asks for the first time
        everybody = run.descendants()
        stopped = run.finish(START_S + END_S)
    finally:
        run.end()
        for process in everybody:
            if process.is_running():
                process.kill()
    assert stopped.code == 75, stopped.output
    assert "the job's time limit is" in stopped.happened("stopped")[-1]["reason"]
    began = stopped.happened("incarnation began")[-1]
    assert (began["previous"], began["step"] >= 2) == ("killed", True)
    assert stopped.happened("checkpoint verified")[-1]["step"] == stopped.happened("stopped")[-1]["step"]
    assert living(everybody) == []
    assert left_in_shared_memory(shm) == set()


def in_update(family: list[psutil.Process]) -> psutil.Process:
    """The trainer's rank, while it is in an update: Ray says so in its title."""
    rank = next(each for each in family if "TrainerActor" in " ".join(each.cmdline()))
    deadline = time.monotonic() + START_S
    while not " ".join(rank.cmdline()).strip().endswith(".update") and time.monotonic() < deadline:
        time.sleep(0.005)
    return rank
