"""Alarms are raised once and cleared once, come before the harm of known faults, and stay away from healthy runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import ANSWERS, FAULTS, GROUPS, Fault, Made, faulty, healthy

from ctpo_megatron.config.alarms import Alarm, AlarmsConfig, BoundAlarm
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.detectors import Reading
from ctpo_megatron.record.alarms.kinds import WORDS, Measure
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.alarms.watch import Alarms, Latch
from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.events import ServerLost, SettingDiffers
from ctpo_megatron.record.story import Happened
from ctpo_megatron.record.story_events import IncarnationBegan, IncarnationEnded
from tests.support.often import often

MEASURE = Measure(GROUPS, ANSWERS, "reward/term/answer")
OFF = dict.fromkeys(WORDS)


def watch(**settings: object) -> Alarms:
    return Alarms(AlarmsConfig.model_validate(settings), MEASURE)


def told(rows: Iterable[Row], alarms: Alarms | None = None) -> list[AlarmRaised | AlarmCleared]:
    alarms = alarms or watch()
    return [each for row in rows for each in alarms.row(row)]


@functools.cache
def with_fault(name: str, seed: int = 501) -> Made:
    return faulty(next(each for each in FAULTS if each.alarm == name), seed)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.alarm)
def test_each_alarm_comes_before_the_harm_and_once(fault: Fault) -> None:
    made = with_fault(fault.alarm)
    assert made.begin is not None
    assert made.harm is not None
    found = told(row for row in made.rows if row["step"] <= made.harm)
    mine = [each for each in found if each.alarm == fault.alarm]
    assert [type(each) for each in mine] == [AlarmRaised]
    assert made.begin <= mine[0].step < made.harm
    assert mine[0].since <= mine[0].step
    assert mine[0].advice
    assert f"ALARM {fault.alarm} at step {mine[0].step}" in mine[0].sentence


def test_every_alarm_has_a_fault_and_words() -> None:
    sections = [name for name, field in AlarmsConfig.model_fields.items() if isinstance(field.default, Alarm)]
    assert sorted(sections) == sorted(WORDS) == sorted(fault.alarm for fault in FAULTS)


def test_made_runs_have_metrics_of_the_catalogue() -> None:
    require_known(set(healthy(1, 2).rows[0]) - {"step", "time"})


@pytest.mark.parametrize("seed", [501, 502])
def test_a_healthy_run_raises_none(seed: int) -> None:
    assert told(healthy(seed).rows) == []


def test_an_alarm_that_is_turned_off_is_silent() -> None:
    rows = with_fault("undecided").rows
    assert {each.alarm for each in told(rows, watch(**OFF | {"undecided": {}}))} == {"undecided"}
    assert told(rows, watch(**OFF)) == []


def test_nothing_is_raised_in_the_warm_up() -> None:
    rows = [{"step": float(n), "time": float(n), "reward/undecided": float(ANSWERS)} for n in range(1, 40)]
    (raised,) = told(rows, watch(warmup=20))
    assert raised.step == 20 + 5 + 2, "five values for a median, and two more for the patience"
    (at_once,) = told(rows, watch(warmup=0))
    assert at_once.step == 7


@pytest.mark.parametrize(
    ("alarm", "metrics"),
    [
        ("drift", ["drift/mean", *(f"drift/from_token_{n}" for n in (1, 4, 16, 64, 256, 1024))]),
        ("length", ["rollout/response_tokens"]),
        ("entropy", ["train/entropy"]),
        ("servers", ["time/rollout_tail", "time/rollout"]),
        ("goodput", ["time", "time/step", "time/rollout", "time/train", "time/batch"]),
        ("sample_size", ["health/effective_sample_size"]),
    ],
)
def test_what_compares_does_not_depend_on_the_unit(alarm: str, metrics: list[str]) -> None:
    """A power of two scales numbers exactly, so even ties stay what they are."""
    rows = with_fault(alarm).rows
    scaled = [{**row, **{name: row[name] / 4 for name in metrics}} for row in rows]
    settings = OFF | {alarm: {"least": 1e-9} if alarm == "sample_size" else {}}
    steps = [[(type(each), each.step) for each in told(each_rows, watch(**settings))] for each_rows in (rows, scaled)]
    assert steps[0] == steps[1] != []


@given(st.lists(st.tuples(st.booleans(), st.booleans())), st.integers(1, 4), st.integers(1, 4))
def test_raised_and_cleared_take_turns(readings: list[tuple[bool, bool]], patience: int, calm: int) -> None:
    latch, turns = Latch(Alarm(patience=patience, calm=calm)), []
    given_ = [Reading(0.0, 0.0, "", over=over, calm=calm_ and not over) for over, calm_ in readings]
    for step, reading in enumerate(given_):
        if latch.take(step, reading):
            turns.append((step, latch.raised))
            count = patience if latch.raised else calm
            last = given_[step + 1 - count : step + 1]
            assert len(last) == count
            assert all(each.over if latch.raised else each.calm for each in last)
            assert not latch.raised or latch.since == step + 1 - count
    assert [raised for _, raised in turns] == [n % 2 == 0 for n in range(len(turns))]


@settings(max_examples=often(20), deadline=None)
@given(st.data())
def test_single_wild_or_missing_values_raise_nothing(data: st.DataObject) -> None:
    """A value that is not finite, missing or a million times itself, now and then, is no fault."""
    rows = [dict(row) for row in healthy(503, 120).rows]
    names = sorted(set(rows[0]) - {"step", "time", "time/step", "time/batch", "time/rollout", "time/train"})
    for at in range(data.draw(st.integers(0, 9)), len(rows), 10):
        name = data.draw(st.sampled_from(names))
        rows[at][name] = data.draw(st.sampled_from([math.nan, math.inf, 0.0, rows[at][name] * 1e6]))
    assert told(rows) == []


def test_an_alarm_clears_when_all_is_well_again_and_comes_back_when_it_is_not() -> None:
    values = [0.0] * 10 + [50.0] * 20 + [0.0] * 20 + [50.0] * 20
    rows = [{"step": float(n), "time": float(n), "reward/undecided": value} for n, value in enumerate(values, 11)]
    found = told(rows, watch(**OFF | {"undecided": {}}))
    assert [type(each) for each in found] == [AlarmRaised, AlarmCleared, AlarmRaised]
    raised, cleared, again = found
    assert isinstance(cleared, AlarmCleared)
    assert cleared.raised == raised.step < cleared.step < again.step
    assert "cleared" in cleared.sentence


def test_between_the_limits_an_alarm_stays_as_it_is() -> None:
    limit = 0.03 * ANSWERS
    values = [0.0] * 10 + [2 * limit] * 10 + [0.95 * limit] * 50
    rows = [{"step": float(n), "time": float(n), "reward/undecided": value} for n, value in enumerate(values, 11)]
    assert [type(each) for each in told(rows, watch(**OFF | {"undecided": {}}))] == [AlarmRaised]


def test_a_solved_task_excuses_equal_groups_entropy_and_a_plateau() -> None:
    def rows(reward: float) -> list[Row]:
        same = {"reward/mean": reward, "reward/mixed_groups": 0.0}
        return [{"step": float(n), "time": float(n), "train/entropy": 0.99**n, **same} for n in range(1, 400)]

    assert told(rows(0.95)) == []
    assert {each.alarm for each in told(rows(0.5))} == {"equal_groups", "entropy", "plateau"}
    with_critic = [row | {"critic/loss": 0.1} for row in rows(0.5)]
    assert {each.alarm for each in told(with_critic)} == {"entropy", "plateau"}, "equal groups teach a critic"


def test_length_that_grows_with_better_answers_is_no_alarm() -> None:
    def rows(better: float) -> list[Row]:
        return [
            {"step": float(n), "time": float(n), "rollout/response_tokens": 100 * 1.01**n, "reward/term/answer": 0.1 + better * n}
            for n in range(1, 200)
        ]

    assert told(rows(0.004)) == []
    assert {each.alarm for each in told(rows(0.0))} == {"length"}


def test_a_server_that_is_lost_again_and_again_is_named() -> None:
    alarms, found = watch(**OFF | {"servers": {}}), []
    for n in range(11, 40):
        if n in (15, 18, 21):
            alarms.event(Happened(float(n), ServerLost.name, {"server": "server 3", "reason": "", "again": True}))
        found += alarms.row({"step": float(n), "time": float(n), "time/step": 1.0})
    assert [(type(each), each.where, each.step) for each in found] == [(AlarmRaised, "server 3", 23)]


def test_a_change_that_is_within_the_noise_of_the_first_steps_is_none() -> None:
    """Drift that jumps between 0.01 and 0.03: its median doubles at 0.04, and 4 of its deviations are at 0.08."""

    def rows(then: float) -> list[Row]:
        values = [0.02 + (0.01 if n % 2 else -0.01) for n in range(25)] + [then] * 20
        return [{"step": float(n), "time": 0.0, "drift/mean": value} for n, value in enumerate(values, 11)]

    assert told(rows(0.07)) == []
    assert {each.alarm for each in told(rows(0.09))} == {"drift"}


def test_accuracy_that_comes_back_clears_its_alarm_and_falls_again() -> None:
    accuracies = [0.9] * 8 + [0.8] * 6 + [0.9] * 6 + [0.7] * 6
    rows = [{"step": float(10 * n), "time": float(n), "eval/accuracy": value} for n, value in enumerate(accuracies, 2)]
    found = told(rows, watch(**OFF | {"accuracy": {}}))
    assert [type(each) for each in found] == [AlarmRaised, AlarmCleared, AlarmRaised]


@pytest.mark.parametrize(
    ("key", "raised"), [("data.eval", False), ("eval.temperature", False), ("eval.every", True), ("seed", True)]
)
def test_accuracy_is_compared_with_that_of_the_same_evaluations(key: str, raised: bool) -> None:
    alarms = watch(**OFF | {"accuracy": {}})
    rows = [{"step": float(10 * n), "time": float(n), "eval/accuracy": 0.9 if n < 12 else 0.6} for n in range(2, 22)]
    assert told(rows[:10], alarms) == []
    alarms.event(Happened(11.5, SettingDiffers.name, {"key": key, "effect": "applies"}))
    assert [type(each) for each in told(rows[10:], alarms)] == [AlarmRaised] * raised


def test_drift_that_is_rounding_is_none_however_it_grows() -> None:
    """As in a run of float32 whose first steps had no token of the newest version."""

    def rows(then: float) -> list[Row]:
        late = {"drift/from_token_1": 1e-9, "drift/from_token_64": then}
        first = [{"step": float(n), "time": 0.0, "drift/mean": 1e-9, "drift/from_token_64": 1e-9} for n in range(1, 36)]
        return [*first, *({"step": float(n), "time": 0.0, "drift/mean": then, **late} for n in range(36, 66))]

    assert told(rows(9e-6)) == []
    assert {each.alarm for each in told(rows(2e-5))} == {"drift"}


def test_goodput_counts_restarts_and_lost_work_and_no_waiting_for_an_allocation() -> None:
    """Steps of 10 s, all of it useful. A process works 30 steps, trains 5 more that are lost, and ends; another goes on."""

    def play(ended_at: float, began_at: float) -> list[AlarmRaised | AlarmCleared]:
        alarms, found, clock = watch(**OFF | {"goodput": {"patience": 1}}), [], 0.0
        alarms.event(Happened(0.0, IncarnationBegan.name, {"process": -5000.0}))  # a slow start is no loss
        for n in range(1, 70):
            if n == 31:
                alarms.event(Happened(ended_at, IncarnationEnded.name, {"at": ended_at}))
                alarms.event(Happened(began_at, IncarnationBegan.name, {"process": began_at}))
                clock = began_at
            clock += 10.0
            seconds = {"time/step": 10.0, "time/rollout": 6.0, "time/train": 3.5, "time/batch": 0.5}
            found += alarms.row({"step": float(n), "time": clock, **seconds})
        return found

    assert play(ended_at=300.0, began_at=100_000.0) == [], "nobody had the run's nodes"
    assert play(ended_at=360.0, began_at=420.0) == [], "60 of 260 s"
    lost = play(ended_at=500.0, began_at=501.0)
    assert [(type(each), each.step) for each in lost] == [(AlarmRaised, 31), (AlarmCleared, 55)], (
        "200 of 400 s, until it is long ago"
    )


def test_a_bound_of_ones_own_is_an_alarm_like_others() -> None:
    bound = {"metric": "train/grad_norm", "above": 2.0, "smooth": 1, "advice": "lower optimizer.lr", "then": "save"}
    rows = [{"step": float(n), "time": 0.0, "train/grad_norm": 1.0 if n < 20 else 3.0} for n in range(11, 40)]
    (raised,) = told(rows, watch(**OFF | {"bounds": {"norm": bound}}))
    assert isinstance(raised, AlarmRaised)
    assert (raised.alarm, raised.step, raised.since, raised.then) == ("norm", 22, 20, "save")
    assert raised.sentence.endswith("Lower optimizer.lr.")


def test_a_metric_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"alarms.bounds.x.metric: 'train/entrop'.*Did you mean 'train/entropy'"):
        watch(bounds={"x": {"metric": "train/entrop", "above": 1.0}})
    assert watch(bounds={"x": {"metric": "moe/load_entropy/layer_7", "below": 0.5}}).standing == {}


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"entropy": {"metric": "train/entropy", "above": 1.0}}, "name of an alarm there is"),
        ({"x": {"metric": "train/entropy"}}, "neither `above` nor `below`"),
        ({"x": {"metric": "train/entropy", "above": 1.0, "below": 2.0}}, "is not under"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlarmsConfig.model_validate({"bounds": bounds})
    assert BoundAlarm(metric="train/entropy", above=1.0).patience == 3
