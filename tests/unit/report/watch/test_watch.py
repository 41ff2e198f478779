"""`ctpo watch`: what is read of a run directory as it grows, and the frames that are made of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs.watch import watch_job
from ctpo_megatron.record.now import Doing, Now, ProcessNow, ServerNow, read_now, write_now
from ctpo_megatron.report.watch.frame import Frame
from ctpo_megatron.report.watch.spark import heights
from ctpo_megatron.report.watch.tail import Tail
from ctpo_megatron.report.watch.view import STALE_S, View
from ctpo_megatron.report.watch.words import duration, number, plain

HOSTILE = "a \x1b[2J\x1b]0;title\x07 reason \u202e backwards\nand a line"
BEGUN = 1_000.0


def write(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def event(name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **fields}


def began(number: int, time: float, step: int = 0) -> dict[str, Any]:
    return event("incarnation began", time, number=number, step=step, checkpoint=None, previous=None)


def ended(number: int, how: str, time: float, reason: str = "") -> dict[str, Any]:
    return event("incarnation ended", time, number=number, how=how, reason=reason, at=time)


def step(count: int, time: float) -> dict[str, Any]:
    phases = {"rollout": 4.0, "train": 3.0, "publish": 1.0}
    return event("step", time, step=count, seconds=10.0, phases=phases, rollout_tail=0.0)


def metrics(count: int, **values: float | str) -> dict[str, Any]:
    ledger = {"ledger/filtered": 1.0, "ledger/failed": 0.0, "ledger/aborted": 0.0}
    return {"step": count, "time": BEGUN + count, "time/step": 10.0, **ledger, **values}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 5 steps out of 20 that goes on, in its second incarnation."""
    (tmp_path / "config.yaml").write_text("name: sums\ntrain: {steps: 20, prompts_per_step: 4}\nrollout: {group_size: 8}\n")
    lost = ended(1, "killed", BEGUN + 45)
    steps = [step(count, BEGUN + 50 + 10 * count) for count in range(3, 6)]
    ready = event("ready", BEGUN + 60, seconds=9.0)
    write(tmp_path / "events.jsonl", began(1, BEGUN), step(3, BEGUN + 40), began(2, BEGUN + 50, 2), lost, ready, *steps)
    write(tmp_path / "metrics.jsonl", *(metrics(count, **{"reward/mean": count / 10}) for count in range(1, 6)))
    servers = [ServerNow(f"server {index}", "serving", 5, 7, 16, 5, index, 0.25) for index in range(9)]
    servers[8] = ServerNow("server 8", "suspended", None, 0, 16, reason=HOSTILE)
    ranks = tuple(ProcessNow(f"trainer rank {rank}", (Doing("update", 5, "", 1.0, 0.0),), 0.1) for rank in range(4))
    driver = (Doing("rollout", 6, "3 of 4 groups", 2.5, 0.1),)
    write_now(tmp_path / "now.json", Now(BEGUN + 101, driver, 0.0, ranks, tuple(servers), {"python tool": (3, 0.2)}))
    return tmp_path


def looked(run: Path, at: float = BEGUN + 102) -> View:
    view = View(run, clock=lambda: at)
    view.look()
    return view


def drawn(view: View, width: int = 80, height: int | None = None) -> list[str]:
    """The lines of a frame, as they stand in a terminal."""
    file = io.StringIO()
    console = Console(width=width, height=height or 50, file=file, force_terminal=True, color_system=None)
    console.print(Frame(view, whole=height is None))
    return file.getvalue().splitlines()


def test_a_file_is_read_once_and_again_where_it_is_replaced(tmp_path: Path) -> None:
    tail, path = Tail(tmp_path / "lines"), tmp_path / "lines"
    assert (tail.look(), list(tail.fresh()), tail.missing) == (False, [], True)
    path.write_bytes(b"one\ntw")
    assert (tail.look(), list(tail.fresh())) == (False, [b"one"])
    path.write_bytes(b"one\ntwo\nthree\n")
    assert (tail.look(), list(tail.fresh())) == (False, [b"two", b"three"])
    assert (tail.look(), list(tail.fresh())) == (False, [])
    other = tmp_path / "other"
    other.write_bytes(b"one\nanother two, of a run that went back\n")
    other.replace(path)
    assert (tail.look(), list(tail.fresh())) == (True, [b"one", b"another two, of a run that went back"])
    path.write_bytes(b"cut\n")
    assert (tail.look(), list(tail.fresh())) == (True, [b"cut"])


def test_where_a_run_stands(run: Path) -> None:
    view = looked(run)
    assert (view.step, view.live, view.eta_s()) == (5, True, 150.0)
    text = "\n".join(drawn(view))
    assert "sums  running, incarnation 2 (1 killed)" in text
    assert "step 5 of 20" in text
    assert "10 s a step, done in 2 min 30 s" in text
    assert "rollout of step 6, 3 of 4 groups, 2.5 s" in text
    assert "rollout 40% train 30% publish 10% other 20% useful 70%" in text
    assert "4 in update of step 6" in text
    assert "3 for python tool (longest 0.2 s)" in text
    assert "20 groups trained on; 5 filtered, 0 failed, 0 aborted" in text
    reward = next(line for line in text.splitlines() if line.startswith("reward/mean"))
    assert reward.split()[-5:] == ["0.5", "0.1", "@1", "0.5", "@5"]


def test_a_run_that_is_silent_has_ended_or_has_not_begun(run: Path) -> None:
    silent = looked(run, at=BEGUN + 101 + STALE_S)
    assert not silent.live
    assert "it may have been killed" in "\n".join(drawn(silent))
    assert silent.present is None
    write(run / "events.jsonl", ended(2, "failed", BEGUN + 103, HOSTILE))
    assert "sums  failed: a" in "\n".join(drawn(looked(run)))
    write(run / "events.jsonl", began(3, BEGUN + 110, 4))
    later = looked(run, at=BEGUN + 111)
    assert "starting for 1.0 s, incarnation 3 (1 killed, 1 failed)" in "\n".join(drawn(later, width=100))
    assert later.step == 4


def test_a_resumed_run_has_one_curve(run: Path) -> None:
    view = looked(run)
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    anew = run / "anew"
    anew.write_text("".join(kept))
    anew.replace(run / "metrics.jsonl")
    write(run / "metrics.jsonl", metrics(4, **{"reward/mean": 0.9}))
    view.look()
    series = view.numbers.series["reward/mean"]
    assert (list(series.values), series.low, series.high) == ([0.1, 0.2, 0.3, 0.9], (0.1, 1), (0.9, 4))
    assert view.numbers.sums["ledger/filtered"] == 4


def test_only_what_is_new_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = looked(run)
    taken: list[bytes] = []
    monkeypatch.setattr(view.numbers, "take", taken.append)
    monkeypatch.setattr(view.happenings, "take", taken.append)
    view.look()
    assert taken == []
    write(run / "metrics.jsonl", metrics(6))
    view.look()
    assert len(taken) == 1


def test_alarms_are_up_until_they_are_cleared(run: Path) -> None:
    raised = {"step": 4, "since": 4, "value": 0.1, "limit": 0.2, "what": "w", "advice": "a", "then": "tell"}
    write(run / "events.jsonl", event("alarm raised", BEGUN + 90, alarm="entropy", where="train/entropy", **raised))
    write(run / "events.jsonl", event("alarm raised", BEGUN + 91, alarm="slow", where="server 0", **raised))
    view = looked(run)
    assert [key[0] for key in view.happenings.alarms] == ["entropy", "slow"]
    lines = drawn(view)
    assert "alarms" in [line.strip() for line in lines]
    cleared = {"step": 5, "raised": 4, "why": "it is well again"}
    write(run / "events.jsonl", event("alarm cleared", BEGUN + 95, alarm="entropy", where="train/entropy", **cleared))
    view.look()
    assert [key[0] for key in view.happenings.alarms] == ["slow"]


def test_the_newest_alarms_say_all_that_they_have_to_say(run: Path) -> None:
    """Their advice comes last; in 80 columns one line has no room for it."""
    words = {
        "what": "the policy loses its choices, or comes apart",
        "advice": "Lower optimizer.lr, or widen the upper bound.",
        "then": "tell",
    }
    for number_of, name in enumerate(("entropy", "length", "drift")):
        numbers = {"step": 4, "since": 4, "value": 0.1, "limit": 0.2}
        write(
            run / "events.jsonl",
            event("alarm raised", BEGUN + 90 + number_of, alarm=name, where="train/entropy", **numbers, **words),
        )
    (up,) = re.findall(r"\nalarms *\n(.*)\nevents", "\n".join(drawn(looked(run), 80)), re.DOTALL)
    shown = " ".join(up.split())
    assert shown.count("Lower optimizer.lr, or widen the upper bound.") == 2
    assert shown.index("ALARM drift") < shown.index("ALARM length") < shown.index("ALARM entropy")
    assert shown.endswith("…")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (140, 40), (60, 30)])
def test_a_frame_fits_and_carries_no_control_characters(run: Path, width: int, height: int) -> None:
    for count in range(20):
        write(run / "events.jsonl", event("server suspended", BEGUN + 90, server=f"server {count}", reason=HOSTILE))
    view = looked(run)
    lines = drawn(view, width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    text = "".join(lines)
    assert text.isprintable()
    assert "server 8" in text, "the one that does not serve comes first"
    assert ("more" in text) == (height == 24)


def test_lines_that_are_none_are_counted_and_numbers_may_be_not_finite(run: Path) -> None:
    write(run / "metrics.jsonl", metrics(6, **{"reward/mean": "NaN"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": "six"}\nno json\n')
    with (run / "events.jsonl").open("a") as file:
        file.write('[]\n{"time": 1.0, "event": "step"}\n')
    view = looked(run)
    assert view.numbers.series["reward/mean"].broken == 1
    assert "4 lines of events.jsonl and metrics.jsonl are not as a run writes them" in view.problem
    assert "1 not finite" in "\n".join(drawn(view, width=140))


def test_one_frame_for_scripts(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = io.StringIO()
    watch_job(run, once=False, every_s=1.0, console=Console(file=file, width=80))  # no terminal
    assert "step 5 of 20" in file.getvalue()
    assert "\x1b" not in file.getvalue()
    with pytest.raises(InputError, match="give the directory of a run"):
        watch_job(tmp_path_factory.mktemp("empty"), once=True, every_s=1.0)


def test_what_a_run_does_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path, now = tmp_path / "now.json", Now(5.0, (Doing("train", 1, "", 2.0, 0.5),))
    write_now(path, now)
    assert read_now(path) == now
    path.write_bytes(path.read_bytes()[:-3])
    assert read_now(path) is None
    assert [each.name for each in tmp_path.iterdir()] == ["now.json"]


def test_sparklines_are_means_of_equal_parts() -> None:
    assert heights([0.0, 1.0, 2.0, 3.0], 4, 8) == [0, 2, 5, 7]
    assert heights([0.0, 2.0, 1.0, 3.0, 8.0, 8.0], 3, 8) == [0, 1, 7]
    assert heights([1.0] * 5, 3, 8) == [4, 4, 4]
    assert heights([-1e308, 1e308], 2, 8) == [0, 7]
    assert heights([], 3, 8) == []


def test_words() -> None:
    assert [duration(each) for each in (0.25, 41.0, 300.0, 7500.0, 3 * 86_400.0)] == [
        "0.2 s",
        "41 s",
        "5 min 00 s",
        "2 h 05 min",
        "3 d 0 h",
    ]
    assert [number(each) for each in (None, 3.0, 0.12345, 1e-7, 12345.0)] == ["-", "3", "0.123", "1.0e-07", "12,345"]
    assert plain("a\x1b[1m\tb\u202e") == "a\ufffd[1m\ufffdb\ufffd"
