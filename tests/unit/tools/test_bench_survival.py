"""The arithmetic of tools/bench_survival.py; nothing is measured."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from pathlib import Path

import bench_survival as bench
import pytest
from rich.console import Console

from ctpo_megatron.types import Composition
from tests.unit.rollout.test_journal import whole


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


def test_what_is_put_off_is_counted_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    switch = bench.Switch()

    async def scenario() -> None:
        journal = bench.jobs.journal.Journal(tmp_path, "r")
        journal.published(0, "w")
        for number in range(20):
            journal.note(whole(0, number))
        assert "write" not in switch.journal
        await journal.sync()
        await journal.sync()  # nothing was noted
        journal.note(whole(1))
        journal.decided(Composition(0, (0,)))  # writes what was noted, too
        journal.note(whole(2))
        async with asyncio.timeout(5):
            while switch.journal["write"] < 3:  # by itself
                await asyncio.sleep(0.01)

    with bench.switched(switch):
        asyncio.run(scenario())
    spent = switch.journal
    counted = {"note": 22, "write": 3, "sync": 2, "publication": 1, "decision": 1}
    assert {what: spent[what] for what in counted} == counted
    assert spent["cpu"] == pytest.approx(sum(spent[f"{what} cpu"] for what in counted))
    assert spent["write cpu"] > 0


def test_writes_are_shown_beside_notes_and_are_part_of_what_the_event_loop_stands_for(rows: list[dict]) -> None:
    for row in rows:
        row["journal"] |= {"note": 500.0, "write": 60.0, "write wall": 0.03, "write cpu": 0.012}
    idle, shown = {True: [{"driver": 0.0}], False: [{"driver": 0.0}]}, io.StringIO()
    bench.show(idle, rows, Console(file=shown, width=150))
    cells = [cell.strip() for cell in shown.getvalue().split("│")]
    counts = cells.index("500")
    assert cells[counts : counts + 3] == ["500", "60", "0"]
    assert cells[counts + 5 : counts + 7] == ["0.500", "0.200"], "milliseconds of a write, and of its CPU time"
    assert bench.costs(idle, rows)["event loop in the journal, of the time"] == pytest.approx((2 * 0.02 + 2 * 0.03) / 4.0)


def test_what_is_timed_within_something_else_is_its_own() -> None:
    switch = bench.Switch()
    with switch.timed("decision"):
        with switch.timed("write"):
            begun = time.thread_time()
            while time.thread_time() - begun < 0.05:
                pass
        with switch.timed("write"):
            pass
    assert switch.journal["write cpu"] >= 0.05
    assert switch.journal["decision cpu"] < 0.02
    assert switch.journal["decision wall"] < switch.journal["write wall"]
    assert switch.journal["cpu"] == pytest.approx(switch.journal["write cpu"] + switch.journal["decision cpu"])
