"""What happens in a run: lines of a file, and sentences for the console."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from ctpo_megatron import record
from ctpo_megatron.record.events import Event, EventLog, RunReady, ServerLost, StepTrained, print_sentence
from ctpo_megatron.record.run_events import RunStopped
from ctpo_megatron.record.story_events import How

MODULES = [importlib.import_module(f"{record.__name__}.{each.name}") for each in pkgutil.iter_modules(record.__path__)]
FOUND = {name: each for module in MODULES if module.__name__.endswith("events") for name, each in vars(module).items()}.values()
KINDS = [kind for kind in FOUND if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event]


def example(kind: type[Event]) -> Event:
    samples = {int: 3, float: 1.5, str: "text", bool: True, str | None: None, int | None: None, tuple[str, ...]: ("a", "b")}
    samples |= {
        dict[str, float]: {"train": 1.5},
        float | None: 1.5,
        dict[str, int | bool | None]: {"dp": 1},
        How: "failed",
        How | None: "killed",
    }
    hints = get_type_hints(kind)
    return kind(**{each.name: samples[hints[each.name]] for each in fields(kind)})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kind_has_a_name_of_its_own_and_a_sentence() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 14
    for kind in KINDS:
        sentence = example(kind).sentence
        assert sentence
        assert "\n" not in sentence


def test_events_are_appended_and_read_as_they_come(tmp_path: Path) -> None:
    path, seen = tmp_path / "run" / "events.jsonl", []
    log = EventLog(path, [seen.append])
    assert not path.parent.exists()  # nothing happened, nothing is made
    log(RunReady(2.5))
    log(ServerLost("server 0", "killed", again=True))
    assert [line["event"] for line in lines(path)] == ["ready", "server lost"]  # before it is closed
    assert lines(path)[1].keys() == {"time", "event", "server", "reason", "again"}
    log.close()
    log.close()
    with path.open("a") as file:
        file.write('{"time": 1, "ev')  # a run that was killed in the middle of a line
    second = EventLog(path)
    second(StepTrained(4, math.inf))
    second.close()
    assert [line["event"] for line in lines(path)] == ["ready", "server lost", "step"]
    assert lines(path)[2]["seconds"] == "Infinity"
    assert seen == [RunReady(2.5), ServerLost("server 0", "killed", again=True)]


def test_the_console_hears_what_is_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    for event in (RunReady(18.2), StepTrained(1, 2.0), RunStopped("SIGTERM", 1)):
        print_sentence(event)
    assert capsys.readouterr().out == "ready after 18 s\n"
