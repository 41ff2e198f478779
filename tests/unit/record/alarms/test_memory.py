"""Alarms that go on with what they remembered are those that read all rows again, and those of a run without a break."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import ANSWERS, GROUPS, LAYERS, POSITIONS

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.loop.alarms import RunAlarms
from ctpo_megatron.record.alarms import replay
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.memory import recall, remember
from ctpo_megatron.record.alarms.replay import Memory, read_rows, settle
from ctpo_megatron.record.alarms.series import Baseline, Best, Recent
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.events import Event, EventLog, ServerLost
from ctpo_megatron.record.files import jsonable
from tests.support.often import often

NAMES = (
    *("reward/mean", "reward/term/answer", "reward/mixed_groups", "reward/undecided", "train/entropy", "rollout/response_tokens"),
    *("rollout/truncated", "tool/error_rate", "drift/mean", "health/effective_sample_size", "train/correction_log"),
    *("rollout/staleness_mean", "ledger/aborted", "time/rollout", "time/train", "time/batch", "time/rollout_tail", "time/step"),
    *("host/memory_used", *(f"drift/from_token_{each}" for each in POSITIONS)),
    *(f"health/clip_fraction/decile_{k}" for k in range(10)),
    *(f"moe/load_max_over_mean/layer_{k}" for k in range(LAYERS)),
)
# so short and so easily raised that random rows raise all of them
CONFIG = AlarmsConfig.model_validate(
    {
        "warmup": 1,
        "baseline": 5,
        "solved": 0.99,
        "plateau": {"steps": 8},
        "memory": {"window": 10},
        "goodput": {"window": 4},
        "servers": {"losses": 1, "within": 3},
        "bounds": {"norm": {"metric": "train/loss", "above": 0.5, "below": 0.1, "smooth": 3, "patience": 1, "calm": 1}},
    }
)
MEASURE = Measure(GROUPS, ANSWERS, "reward/term/answer")


class Run:
    """A run in a directory: what is written there, and the alarms that watch it. A second passes with each row and loss."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.log, self.now = directory, EventLog(directory / "events.jsonl"), 1e9
        self.alarms = RunAlarms(lambda: Alarms(CONFIG, MEASURE), self._emit)
        asyncio.run(self.alarms.begin(directory))

    def _emit(self, event: Event) -> None:
        self.log(event, self.now)
        self.alarms(event)

    def row(self, row: dict[str, float]) -> None:
        self.now += 1.0
        row = row | {"time": self.now}
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(jsonable(row)) + "\n")
        self.alarms.row(row)

    def lose(self, server: int) -> None:
        self.now += 1.0
        self._emit(ServerLost(f"server {server}", "gone", again=True))

    def again(self, memory: Memory | None) -> tuple[Memory | None, list[Event]]:
        """Returns what alarms remember that go on in this directory, and what they told at once."""
        told: list[Event] = []
        found = RunAlarms(lambda: Alarms(CONFIG, MEASURE), told.append)
        asyncio.run(found.begin(self.directory, memory))
        return found.memory(), told


def rows_of(values: list[list[float]]) -> list[dict[str, float]]:
    return [{"step": float(n + 1), **dict(zip(NAMES, line, strict=True)), "train/loss": line[0]} for n, line in enumerate(values)]


@st.composite
def stories(draw: st.DrawFn) -> tuple[list[list[float]], dict[int, int], int]:
    """Random rows with levels that jump, steps behind which a server is lost, and the place of a checkpoint."""
    count = draw(st.integers(1, 60))
    rng = random.Random(draw(st.integers(0, 2**32)))
    level = [rng.random() for _ in NAMES]
    found = []
    for _ in range(count):
        if rng.random() < 0.1:
            level = [rng.choice([0.001, 0.3, 0.9, 5.0]) * rng.random() for _ in NAMES]
        found.append([math.nan if rng.random() < 0.01 else each * rng.uniform(0.9, 1.1) for each in level])
    lost = draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 2), max_size=4))
    return found, lost, draw(st.integers(0, count - 1))


@settings(max_examples=often(20), deadline=None)
@given(stories())
def test_what_is_remembered_and_read_is_what_a_run_without_a_break_has(tmp_path_factory, story) -> None:
    values, lost, cut = story
    run = Run(tmp_path_factory.mktemp("run"))
    memory: Memory | None = None
    for n, row in enumerate(rows_of(values)):
        run.row(row)
        if n in lost:
            run.lose(lost[n])
        if n == cut:
            memory = json.loads(json.dumps(run.alarms.memory()))
    whole = run.alarms.memory()
    assert run.again(memory) == (whole, [])
    assert run.again(None) == (whole, [])


def test_only_rows_and_events_behind_the_memory_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, decoded = Run(tmp_path), list[str]()
    rows = rows_of([[0.5] * len(NAMES)] * 40)
    for row in rows[:30]:
        run.row(row)
    run.lose(1)
    memory = run.alarms.memory()
    for row in rows[30:]:
        run.row(row)
    one = replay._row
    monkeypatch.setattr(replay, "_row", lambda line, where: decoded.append(where) or one(line, where))
    run.again(memory)
    assert [where.rpartition(" ")[2] for where in decoded] == [str(number) for number in range(30, 41)], "30: to compare"


OTHERS: dict[str, Any] = {
    "other settings": {"made_of": "other"},
    "rows that are not there": {"rows": 100},
    "other rows": {"last": [5.0, 7.0]},
    "events that are not there": {"events": 50},
    "another release": {"state": [[{}], [], {}]},
    "no memory at all": {"events": "x"},
    "a number less": {"rows": None},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_memory_of_something_else_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    run = Run(tmp_path)
    for row in rows_of([[0.5 + 0.01 * n] * len(NAMES) for n in range(30)]):
        run.row(row)
    memory, whole = run.alarms.memory(), run.alarms.memory()
    assert memory is not None
    assert run.again(memory | change) == (whole, [])


def test_what_happens_while_files_are_read_is_heard_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    for row in rows_of([[0.5] * len(NAMES)] * 5):
        run.row(row)
    found = RunAlarms(lambda: Alarms(CONFIG, MEASURE), lambda _event: None)

    def while_it_reads(*words: Any) -> Any:
        lost = ServerLost("server 1", "gone", again=True)
        run.log(lost, 2e9)  # in the file, too, behind what is looked at
        found(lost)
        return settle(*words)

    monkeypatch.setattr("ctpo_megatron.loop.alarms.settle", while_it_reads)
    asyncio.run(found.begin(tmp_path))
    run.alarms(ServerLost("server 1", "gone", again=True))
    assert found.memory() == run.alarms.memory()
    assert found.memory()["events"] == 1


def test_a_memory_without_all_of_its_numbers_is_none() -> None:
    alarms = Alarms(CONFIG, MEASURE)
    assert alarms.memory() is not None
    alarms._progress[0].best.now = math.inf
    assert alarms.memory() is None


def test_series_come_back_with_their_bounds_and_what_is_shared_stays_shared() -> None:
    best = Best(3)
    for value in (1.0, 2.0, 3.0, 4.0):
        best.add(value)
    base = Baseline(2, 0.1)
    base.add(1.0)
    kept = json.loads(json.dumps(remember([best, base, best])))
    assert kept[2] is None
    again = Best(3)
    found = recall([again, Baseline(2, 0.1), again], kept)
    assert found[0] is found[2]
    assert remember(found) == kept
    found[0].add(5.0)
    assert list(found[0]._recent.values) == [3.0, 4.0, 5.0]
    with pytest.raises(ValueError, match="are remembered here; found"):
        recall(Recent(2), {"other": 1})


def test_rows_are_skipped_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('nonsense\n{"step": 2, "time": 1.0}\n')
    assert [row["step"] for row in read_rows(path, 1)] == [2.0]
