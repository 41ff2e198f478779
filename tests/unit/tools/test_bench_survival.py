"""The arithmetic of tools/bench_survival.py; nothing is measured."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import bench_survival as bench
import pytest


def marks(*cpu: float) -> list[bench.Mark]:
    """Steps that take two seconds each, and the CPU time of each; the journal takes 0.01 s of those that have it."""
    at, total, noted, made = 0.0, 0.0, 0.0, [bench.Mark(0.0, {"driver": 0.0}, {})]
    for version, each in enumerate(cpu):
        at, total, noted = at + 2.0, total + each, noted + (0.01 if version % 4 in (0, 1) else 0.0)
        made.append(bench.Mark(at, {"driver": total / 2, "server": total / 2}, {"cpu": noted, "note wall": 2 * noted}))
    return made


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Steps of which the first is left out; the last two of the other four are twice as long in tokens."""
    lines = [{"step": step, "train/loss": 0.0, "rollout/sampled_tokens": 10.0 * (1 + (step > 3))} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    switch = bench.Switch(marks=marks(50.0, 2.2, 2.0, 4.0, 4.0))
    return bench.steps(switch, tmp_path, attempts=4)


def test_steps_with_and_without_take_turns(rows: list[dict]) -> None:
    assert [row["on"] for row in rows] == [True, False, False, True]
    assert [row["tokens"] for row in rows] == [40.0, 40.0, 80.0, 80.0]
    assert [sum(row["cpu"].values()) for row in rows] == pytest.approx([2.2, 2.0, 4.0, 4.0])
    assert bench.compared(rows)["CPU"] == pytest.approx([1.1, 1.0])
    assert bench.compared(rows)["wall"] == pytest.approx([1.0, 1.0])


def test_the_watch_is_a_difference_and_the_guard_is_never_off(rows: list[dict]) -> None:
    watched = [{"driver": 0.03, "guard": 0.001}] * 3
    idle = {True: watched, False: [{"driver": 0.02, "guard": 0.001}, {"driver": 0.01, "guard": 0.001}, {"driver": 0.02}]}
    idle[False][2]["guard"] = 0.001
    assert bench.watch_of(idle) == pytest.approx({"driver": 0.01, "guard": 0.001})
    found = bench.costs(idle, rows)
    assert found["watch, CPU s per s"] == pytest.approx(0.011)
    assert found["watch, of the CPU time of a step"] == pytest.approx(0.011 * 4.0 / 6.2)
    assert found["journal, of the CPU time of a step"] == pytest.approx(0.02 / 6.2)
    assert found["event loop in the journal, of the time"] == pytest.approx(0.04 / 4.0)
    assert found["seconds a step"] == pytest.approx(2.0)


def test_the_kernel_tells_the_time_of_a_process_and_of_a_thread() -> None:
    begun = time.process_time()
    while time.process_time() - begun < 0.05:
        pass
    assert bench.cpu_s(os.getpid()) == pytest.approx(time.process_time(), abs=0.02)
    assert 0.05 <= bench.cpu_s(os.getpid(), thread=True) <= bench.cpu_s(os.getpid()) + 0.02
    assert bench.cpu_s(1 << 22) == 0.0
