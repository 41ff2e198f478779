"""The parts of a report: numbers by hand, and each figure is right in the language of charts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.record.story import Happened
from ctpo_megatron.report.figures import times
from ctpo_megatron.report.figures.times import BUBBLE
from ctpo_megatron.report.parts import health, phases, processes
from ctpo_megatron.report.parts.events import events
from ctpo_megatron.report.parts.proofs import proofs
from ctpo_megatron.report.parts.settings import settings
from ctpo_megatron.report.reading.metrics import read_rows
from ctpo_megatron.report.reading.run import Run, read_run
from ctpo_megatron.report.report import Report, make_report
from tests.support import run_dirs


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report([run_dirs.write_run(tmp_path_factory.mktemp("made") / "run")])


@pytest.fixture(scope="module")
def numbers(report: Report) -> dict[str, Any]:
    return report.numbers()["runs"][0]


def test_every_figure_is_valid_and_has_words(report: Report) -> None:
    figures = report.figures()
    assert {
        "reward",
        "accuracy",
        "spread",
        "clip",
        "drift",
        "sample_size",
        "timeline",
        "step_seconds",
        "time_by_cause",
        "by_length",
    } <= figures.keys()
    for figure in figures.values():
        spec = figure.spec(validate=True)
        assert figure.says in spec["description"]
        assert figure.says


def test_the_first_screen(numbers: dict[str, Any]) -> None:
    first = numbers["overview"]
    assert (first["state"], first["step"], first["of"], first["reward"]) == ("done", 12, 12, 0.6)
    assert first["accuracy"] == {"held_out": {"first": 0.2, "last": 0.6, "low": 0.5, "high": 0.7}}
    assert first["goodput"] == pytest.approx(108 / 140)
    (row,) = [each for each in numbers["figures"]["reward"]["values"] if each["step"] == 10]
    assert (row["value"], row["high"]) == (0.5, pytest.approx(0.5 + 1.96 * (1 / 3) ** 0.5 / 2, rel=1e-6))


def test_health_by_windows_of_steps(numbers: dict[str, Any]) -> None:
    spread = numbers["health"]["spread"]
    assert {each["steps"] for each in spread} == {"steps 1 to 4", "steps 5 to 8", "steps 9 to 12"}
    last = spread[-1]
    assert last["t"] == pytest.approx(24.0)  # the mean of 16 to 32, as the fitted law tells it
    assert last["value"] == pytest.approx(0.1 * 24**0.5)
    assert last["fit"] == pytest.approx(last["value"])


def test_a_spread_is_pooled_by_its_squares() -> None:
    """Standard deviations of 3 and 4 at the same place are one of sqrt(12.5), not of 3.5."""
    std, fit = "health/log_ratio_std/from_token_1", "health/log_ratio_fit/from_token_1"
    rows = [{"step": step, std: float(2 + step), fit: 1.0, "health/log_ratio_sigma": 1.0} for step in (1, 2)]
    (place,) = health.spreads(read_rows(rows))
    assert (place.window, place.t, place.value) == ("steps 1 to 2", 1.0, pytest.approx(12.5**0.5))


def test_bubbles_by_process(numbers: dict[str, Any]) -> None:
    """Of 10 s: servers work in 6 of rollout and 1 of publication, the trainer in 3 and 1, the driver in none of these."""
    bubbles = numbers["phases"]["bubbles"]
    assert bubbles == {"driver": 1.0, "trainer ranks": pytest.approx(0.6), "servers": pytest.approx(0.3)}


def test_bubbles_of_each_rank_and_server(numbers: dict[str, Any]) -> None:
    """Rank 1 waits for 0.3 of 3 s of training, and 6 s in which it has no part; server 1 has work for 3 of 6 s of rollout."""
    shares = {"trainer rank 0": 0.63, "trainer rank 1": 0.69, "server 0": 0.3, "server 1": 0.6}
    assert numbers["phases"]["bubbles_by_process"] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("busy", "ahead", "expected"),
    [
        (0.3, False, [("rollout", 3.0), (BUBBLE, 2.0), (BUBBLE, 1.0), (BUBBLE, 3.0), ("publish", 1.0)]),
        (0.55, False, [("rollout", 5.0), ("rollout tail", 0.5), (BUBBLE, 0.5), (BUBBLE, 3.0), ("publish", 1.0)]),
        (0.75, True, [("rollout", 5.0), ("rollout tail", 1.0), ("rollout", 1.5), (BUBBLE, 1.5), ("publish", 1.0)]),
        (1.5, True, [("rollout", 5.0), ("rollout tail", 1.0), ("rollout", 3.0), ("publish", 1.0)]),
    ],
)
def test_what_one_server_did(busy: float, ahead: bool, expected: list[tuple[str, float]]) -> None:
    spans = phases.spans_of(Happened(100.0, "step", run_dirs.step_event(1, 100.0)), ahead=ahead)
    known = read_rows([{"step": 1, "servers/busy/server_3": busy}])
    (own,) = processes.of_each(known, spans).values()
    assert {each.process for each in own} == {"server 3"}
    assert [(each.doing, pytest.approx(each.end - each.begin)) for each in own] == expected
    assert own[0].begin == 90.0
    assert all(one.end == other.begin for one, other in pairwise(own))
    assert own[-1].end == 100.0


def test_a_phase_that_a_step_did_not_have_takes_no_room_in_its_stack() -> None:
    figure = times.phases({"train": [(1, 3.0), (2, 3.0), (3, 4.0)], "evaluate": [(0, 5.0), (3, 6.0)], "sleep": []})
    assert figure is not None
    (drawn_rows,) = figure.spec()["datasets"].values()
    drawn = {(each["phase"], each["step"]): each["seconds"] for each in drawn_rows}
    assert drawn == {
        **{("train", 0): 0.0, ("train", 1): 3.0, ("train", 2): 3.0, ("train", 3): 4.0},
        **{("evaluate", 0): 5.0, ("evaluate", 1): 0.0, ("evaluate", 2): 0.0, ("evaluate", 3): 6.0},
    }


def test_every_phase_has_a_colour_of_its_own() -> None:
    """In a step that has all of them, none has that of waiting."""
    everything = {phase: 1.0 for phase in phases.WORK if phase != phases.TAIL}
    spans = phases.spans_of(
        Happened(100.0, "step", {"step": 1, "seconds": 20.0, "phases": everything, "rollout_tail": 0.5}), ahead=False
    )
    figure = times.timeline(spans, phases.PROCESSES)
    assert figure is not None
    scale = figure.spec()["encoding"]["color"]["scale"]
    assert len(scale["domain"]) == len(scale["range"]) == len(set(scale["range"]))
    assert set(scale["domain"]) >= {"rollout", "rollout tail", "batch", "train", "publish", "evaluate", "checkpoint", BUBBLE}


def test_of_many_processes_those_are_drawn_that_wait_most_and_least() -> None:
    waits = {f"server {n}": n / 100 for n in range(20)} | {"trainer rank 0": 0.5}
    assert processes.chosen(waits) == ["trainer rank 0", *(f"server {n}" for n in (0, 1, 2, 3, 16, 17, 18, 19))]


def test_servers_that_sample_ahead_do_not_wait_for_training() -> None:
    event = Happened(100.0, "step", run_dirs.step_event(1, 100.0))
    for ahead, expected in ((False, BUBBLE), (True, "rollout")):
        spans = [each for each in phases.spans_of(event, ahead=ahead) if each.process == "servers"]
        assert [each.doing for each in spans] == ["rollout", "rollout tail", expected, "publish"]
        assert [each.end - each.begin for each in spans] == pytest.approx([5.0, 1.0, 3.0, 1.0])


def test_time_between_phases_is_the_drivers() -> None:
    event = Happened(100.0, "step", {"step": 3, "seconds": 10.0, "phases": {"train": 4.0}})
    spans = phases.spans_of(event, ahead=False)
    assert [(each.process, each.doing, each.begin, each.end) for each in spans[3:]] == [
        ("driver", "other", 94.0, 100.0),
        ("trainer ranks", BUBBLE, 94.0, 100.0),
        ("servers", BUBBLE, 94.0, 100.0),
    ]


def test_the_ledger_by_length_and_difficulty(numbers: dict[str, Any]) -> None:
    ledger = numbers["ledger"]
    assert ledger["groups"]["trained"] == 48
    assert ledger["by_length"] == {"64": {"trained": 48, "filtered": 0, "failed": 0, "aborted": 0}}
    # half of the groups have reward 0; 0.1 and 0.2, 0.3 and 0.4, 0.5 to 0.7, 0.8 and 0.9, 1 to 1.2, two of each
    assert {name: each["trained"] for name, each in ledger["by_difficulty"].items()} == {
        "0": 24,
        "0 to 0.25": 4,
        "0.25 to 0.5": 4,
        "0.5 to 0.75": 6,
        "0.75 to 1": 4,
        "1": 6,
    }


def told(tmp_path: Path, *more: dict[str, Any]) -> Run:
    return read_run(run_dirs.write_run(tmp_path / "run", told=[*run_dirs.events()[:-1], *more]))


def test_what_is_proven_and_what_is_not(tmp_path: Path) -> None:
    bad = {"time": run_dirs.T0 + 150, "event": "checkpoint damaged", "checkpoint": "step_00000008", "reason": "a hash"}
    rows = [run_dirs.metrics(step) for step in range(1, 15)]
    run = read_run(run_dirs.write_run(tmp_path / "run", rows=rows, told=[*run_dirs.events()[:-1], bad]))
    numbers = proofs(run, "").numbers
    assert (numbers["publications"], numbers["last_version"], numbers["servers"]) == (12, 12, 2)
    assert (numbers["verified"], numbers["last_verified"], numbers["unproven_steps"]) == (3, 12, 2)
    assert numbers["attested"] == 14
    assert numbers["canary_gap_max"] == 1e-6
    assert len(numbers["trouble"]) == 1


def test_what_changed_between_incarnations(tmp_path: Path) -> None:
    again = run_dirs.began(2, run_dirs.T0 + 200, checkpoint="step_00000012", step=12, host="two", previous="killed")
    differs = {"key": "optimizer.lr", "before": "0.1", "now": "0.2", "effect": "applies", "meaning": "applies from now on"}
    run = told(tmp_path, again, {"time": run_dirs.T0 + 201, "event": "setting differs", **differs})
    changes = settings(run, "").numbers["changes"]
    assert [(each["incarnation"], each["key"], each["before"], each["now"]) for each in changes] == [
        (2, "host", "one", "two"),
        (2, "optimizer.lr", "0.1", "0.2"),
    ]


def test_routine_is_counted_and_the_rest_is_told(tmp_path: Path) -> None:
    numbers = events(told(tmp_path, {"time": run_dirs.T0 + 150, "event": "part lost", "reason": "rank 0"}), "").numbers
    assert numbers["counts"]["step"] == 12
    assert [each["name"] for each in numbers["events"]] == ["incarnation began", "ready", "part lost"]
    assert numbers["events"][-1]["after"] == 150.0
    assert numbers["events"][-1]["sentence"] == "lost: rank 0"


def test_a_run_that_has_only_begun_has_every_part(tmp_path: Path) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run", rows=[], told=[run_dirs.began(1, run_dirs.T0)], groups=[], accuracies={})
    report = make_report([run_dir])
    assert len(report.parts[0]) == 9
    assert "Nothing yet" in report.html()
