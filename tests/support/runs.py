"""Runs of the `ctpo` command as a user would start them, with everything they leave behind looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 240.0
END_S = 90.0


@dataclass
class Finished:
    """A command that ended."""

    code: int
    output: str
    run_dir: Path

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def events(self) -> list[dict]:
        return read_events(self.run_dir)

    def happened(self, name: str) -> list[dict]:
        """The events of that name."""
        return [event for event in self.events if event["event"] == name]

    def trajectories(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "rollouts" / name).read_text().splitlines()]


class Started:
    """A command that runs; `text` is what it has printed so far, `events` what has happened."""

    def __init__(self, command: str, config: str, run_dir: Path, *overrides: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir, self._log = run_dir, run_dir / "output.txt"
        words = [sys.executable, "-m", "ctpo_megatron.cli", command, str(ROOT / "configs" / config), f"run_dir={run_dir}"]
        with self._log.open("w") as sink:
            self.process = subprocess.Popen(
                [*words, *overrides], stdout=sink, stderr=subprocess.STDOUT, cwd=run_dir, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self._log.read_text()

    @property
    def events(self) -> list[dict]:
        return read_events(self.run_dir)

    def happened(self, name: str) -> list[dict]:
        """The events of that name so far."""
        return [event for event in self.events if event["event"] == name]

    def wait_for_event(self, name: str, timeout_s: float = START_S, *, after: float = 0.0, **fields: object) -> dict:
        """The first event of that name `after` a time with these `fields`; fails when the command ends or time runs out first."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None
            events = [each for each in self.events if each["event"] == name and each["time"] > after]
            found = [each for each in events if fields.items() <= each.items()]
            if found:
                return found[0]
            if ended or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"no event {name!r} with {fields} (exit code {self.process.poll()}):\n{self.text}")
            time.sleep(0.2)

    def interrupt(self, number: int) -> None:
        """A signal to the whole process group, as a terminal sends Ctrl-C."""
        os.killpg(self.process.pid, number)

    def descendants(self) -> list[psutil.Process]:
        """All processes below the command."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self, timeout_s: float) -> Finished:
        """Its end; a command that takes longer is killed and fails the test."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.text}") from None
        return Finished(code, self.text, self.run_dir)

    def end(self) -> None:
        """Kill what is left of it."""
        if self.process.poll() is None:
            left = self.descendants()
            self.process.kill()
            for process in left:
                process.kill()
            self.process.wait(10)


def check_stopped(ended: Finished, number: signal.Signals, *, times: int, code: int) -> None:
    """It ended as the signal asks: in order after the first one, at once after a second."""
    assert ended.code == code, ended.output
    assert "Traceback" not in ended.output
    assert f"{number.name}: stopping in order" in ended.output
    assert (f"{number.name}: ending the run's processes ..." in ended.output) == (times == 2)
    assert ("the same command with --resume auto goes on" in ended.output) == (code == 75)
    assert [event["reason"] for event in ended.happened("stop requested")] == [number.name]
    assert ended.happened("done") == []


def read_events(run_dir: Path) -> list[dict]:
    """What has happened in a run so far; a line that is being written is left out."""
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
