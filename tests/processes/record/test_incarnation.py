"""Two processes and one run directory: the second one is refused while the first lives, and goes on when it is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpo_megatron.errors import InputError
from ctpo_megatron.record.events import DataRead
from ctpo_megatron.record.incarnation import IncarnationLog

FIRST = """
import sys
from pathlib import Path
from ctpo_megatron.record.incarnation import IncarnationLog

with IncarnationLog(Path(sys.argv[1])) as events:
    events.begin(checkpoint=None, step=0)
    print("begun", flush=True)
    sys.stdin.read()
"""
TOLD = DataRead("prompts.jsonl", 3, 3, ())


@pytest.fixture
def first(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that works in the directory until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def story(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def second(run_dir: Path) -> None:
    with IncarnationLog(run_dir) as events:
        events(TOLD)  # as of what is read before a run begins
        events.begin(checkpoint=None, step=0)


def test_the_story_of_a_process_that_lives_is_its_own(first: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=f"process {first.pid} of this host works in it .incarnation 1"):
            second(tmp_path)
        assert [each["event"] for each in story(tmp_path)] == ["incarnation began"]
    first.communicate(timeout=30)
    second(tmp_path)
    assert [each["how"] for each in story(tmp_path) if each["event"] == "incarnation ended"] == ["done", "done"]


def test_one_that_was_killed_is_noticed(first: subprocess.Popen[str], tmp_path: Path) -> None:
    first.kill()
    first.wait(30)
    second(tmp_path)
    began = [each for each in story(tmp_path) if each["event"] == "incarnation began"]
    assert [(each["number"], each["previous"]) for each in began] == [(1, None), (2, "killed")]
    assert [each["how"] for each in story(tmp_path) if each["event"] == "incarnation ended"] == ["killed", "done"]
    assert "data read" in {each["event"] for each in story(tmp_path)}
