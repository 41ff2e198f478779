"""A run that stops, goes on or goes back has the alarms of one that did not, and tells of each once."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import ANSWERS, FAULTS, GROUPS, faulty

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.errors import InputError
from ctpo_megatron.loop.alarms import RunAlarms
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.replay import GONE, Memory, read_rows, replay
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.events import EventLog
from ctpo_megatron.record.files import drop_steps, jsonable
from tests.support.often import often

STEPS = 90
Line = dict[str, float]


@functools.cache
def rows() -> list[Line]:
    """A run with several faults, one of which is mended."""
    made = {each.alarm: faulty(each, 7) for each in FAULTS if each.alarm in ("undecided", "mismatch")}
    first = made["mismatch"].begin or 0
    found = []
    for n in range(STEPS):
        row = dict(made["mismatch"].rows[first + n]) | {"step": float(n + 1), "time": 1e9 + n}
        row["reward/undecided"] = float(ANSWERS // 8) if 30 <= n < 50 or n >= 70 else 0.0
        found.append(row)
    return found


def alarms(**settings: object) -> Alarms:
    return Alarms(AlarmsConfig.model_validate(settings), Measure(GROUPS, ANSWERS))


class Run:
    """A run directory, worked on by one process after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = EventLog(directory / "events.jsonl")

    def work(self, first: int, last: int, memory: Memory | None = None, **settings: object) -> RunAlarms:
        """Make the steps from `first` to `last`, counted from 1; later ones of an earlier process are dropped."""
        path = self.directory / "metrics.jsonl"
        drop_steps(path, first)
        found = RunAlarms(lambda: alarms(**settings), self.log)
        asyncio.run(found.begin(self.directory, memory))
        with path.open("a") as file:
            for row in rows()[first - 1 : last]:
                file.write(json.dumps(jsonable(row)) + "\n")
                found.row(row)
        return found

    def told(self) -> list[dict]:
        """The events of alarms, without their time."""
        path = self.directory / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@functools.cache
def without_a_break() -> list[tuple[str, str, int]]:
    found = alarms()
    return [(each.name, each.alarm, each.step) for row in rows() for each in found.row(row)]


def test_the_run_raises_and_clears() -> None:
    assert [name for name, _, _ in without_a_break()].count(AlarmRaised.name) >= 3
    assert AlarmCleared.name in [name for name, _, _ in without_a_break()]


@settings(max_examples=often(12), deadline=None)
@given(st.lists(st.integers(1, STEPS - 1), max_size=3, unique=True).map(sorted))
def test_a_run_that_stops_and_goes_on_has_the_alarms_of_one_that_does_not(tmp_path_factory, stops: list[int]) -> None:
    run = Run(tmp_path_factory.mktemp("run"))
    for first, last in zip([1, *(each + 1 for each in stops)], [*stops, STEPS], strict=True):
        run.work(first, last)
    assert [(each["event"], each["alarm"], each["step"]) for each in run.told()] == without_a_break()
    again = alarms()
    assert [(each.name, each.alarm, each.step) for each in replay(again, run.directory)] == without_a_break()


@settings(max_examples=often(12), deadline=None)
@given(st.lists(st.tuples(st.integers(1, STEPS), st.integers(0, 40)), max_size=4))
def test_whatever_a_run_goes_back_behind_raised_and_cleared_take_turns(tmp_path_factory, ends: list[tuple[int, int]]) -> None:
    """Each process works up to some step and is killed; the next begins at a checkpoint from before."""
    run, first = Run(tmp_path_factory.mktemp("run")), 1
    for last, lost in ends:
        if last >= first:
            run.work(first, last)
            first = max(1, last - lost + 1)
    run.work(first, STEPS)
    by_alarm: dict[str, list[str]] = {}
    for each in run.told():
        by_alarm.setdefault(each["alarm"], []).append(each["event"])
    for names in by_alarm.values():
        assert names == [(AlarmRaised.name, AlarmCleared.name)[n % 2] for n in range(len(names))]
    standing = {name for name, names in by_alarm.items() if len(names) % 2}
    final = alarms()
    replay(final, run.directory)
    assert standing == set(final.standing)


def test_what_a_run_went_back_behind_is_cleared_with_that_reason(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.work(1, 45)
    assert [(each["event"], each["alarm"]) for each in run.told()][-1] == (AlarmRaised.name, "undecided")
    run.work(21, 25)
    last = [each for each in run.told() if each["alarm"] == "undecided"][-1]
    assert (last["event"], last["why"]) == (AlarmCleared.name, GONE)


def test_other_settings_are_applied_to_the_steps_before(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.work(1, 45)
    run.work(46, 46, undecided=None, warmup=46)
    assert run.told()[-1]["why"] == GONE
    run.work(47, 47)
    assert run.told()[-1]["event"] == AlarmRaised.name
    assert run.told()[-1]["step"] < 46, "told late, with the step at which it was"


@pytest.mark.parametrize(("then", "saves", "stops"), [("tell", False, False), ("save", True, False), ("stop", False, True)])
def test_an_alarm_saves_or_stops_where_that_is_wanted(tmp_path: Path, then: str, saves: bool, stops: bool) -> None:
    found, orders = Run(tmp_path).work(1, 45, undecided={"then": then}, mismatch=None), Orders()
    found.obey(orders)
    assert orders.take_save() is saves
    assert (orders.stop_request is not None) is stops
    if orders.stop_request is not None:
        assert orders.stop_request.reason.startswith("alarm undecided: the grader gives no verdict")
    second = Orders()
    found.obey(second)
    assert (second.take_save(), second.stop_request) == (False, None), "once"


def test_a_stop_is_not_asked_for_again_by_the_run_that_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.work(1, 45, undecided={"then": "stop"})
    orders = Orders()
    run.work(46, 47, undecided={"then": "stop"}).obey(orders)
    assert orders.stop_request is None


def test_rows_are_read_back_as_they_were_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_rows(path)) == []
    path.write_text('{"step": 1, "time": 2.0, "train/loss": "NaN"}\n{"step": 2, "ti')
    (row,) = read_rows(path)
    assert (row["step"], str(row["train/loss"])) == (1.0, "nan")
    path.write_text('{"step": 1, "time": 2.0}\n{"step": 1}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl line 2: a row is an object of numbers"):
        list(read_rows(path))
