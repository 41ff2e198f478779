"""A run directory as it stands at a moment: its files read together, each only as far as it is new."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctpo_megatron.errors import InputError, reason
from ctpo_megatron.record.now import NAME as NOW
from ctpo_megatron.record.now import Now, age_s, read_now
from ctpo_megatron.report.watch.happenings import Happenings
from ctpo_megatron.report.watch.numbers import Numbers
from ctpo_megatron.report.watch.tail import Tail

STALE_S = 20.0  # now.json is replaced every two seconds; clocks of two hosts, and file systems, are late by some
QUIET_S = 600.0  # of a run without it: an older release, or one whose processes are not up yet
EVENTS, METRICS, CONFIG = "events.jsonl", "metrics.jsonl", "config.yaml"


@dataclass(frozen=True, slots=True)
class Settings:
    """What of the configuration is shown; None: it does not say."""

    name: str
    steps: int | None
    groups: int | None  # of a step
    group_size: int | None


class View:
    """The run in `run_dir`. `look` reads what is new, and nothing twice; `clock`: seconds since 1970."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.run_dir, self.clock = run_dir, clock
        self.happenings, self.numbers = Happenings(), Numbers()
        self.settings = Settings(run_dir.name, None, None, None)
        self.now: Now | None = None
        self.problem = ""  # what could not be read at the last look
        self._events, self._metrics = Tail(run_dir / EVENTS), Tail(run_dir / METRICS)
        self._config: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise InputError where the directory is none of a run."""
        if not any((self.run_dir / name).is_file() for name in (EVENTS, METRICS, CONFIG)):
            raise InputError(f"{self.run_dir}: there is no {EVENTS}, {METRICS} or {CONFIG}; give the directory of a run")

    def look(self) -> None:
        """Read what is new. What cannot be read now is named by `problem`, and read later."""
        self.problem = ""
        for tail, into in ((self._events, self.happenings), (self._metrics, self.numbers)):
            try:
                if tail.look():
                    into.clear()
                for line in tail.fresh():
                    into.take(line)
            except OSError as error:
                self.problem = f"{tail.path}: {reason(error)}"
        self.now = read_now(self.run_dir / NOW) or self.now
        self._read_config()
        unreadable = self.happenings.unreadable + self.numbers.unreadable
        if unreadable and not self.problem:
            self.problem = f"{unreadable} lines of {EVENTS} and {METRICS} are not as a run writes them, and are left out"

    @property
    def step(self) -> int:
        """Returns how many training steps are done."""
        return self.happenings.step if self.happenings.lives else max(self.happenings.step, self.numbers.step)

    @property
    def heard(self) -> float | None:
        """Returns when the run gave its last sign of life, seconds since 1970; None where it gave none."""
        times = [self.happenings.time, self.numbers.time, None if self.now is None else self.now.time]
        return max((each for each in times if each is not None), default=None)

    @property
    def live(self) -> bool:
        """Returns whether the run goes on, as far as its files tell."""
        life = self.happenings.life
        if (life is not None and life.how is not None) or self.heard is None:
            return False
        known = self.now is not None and (life is None or self.now.time >= life.began)
        if known and self.now is not None:
            return age_s(self.now, self.clock()) < STALE_S
        return self.clock() - self.heard < QUIET_S

    @property
    def present(self) -> Now | None:
        """Returns what the run is doing; None where that is not known, or long ago."""
        return self.now if self.live and self.now is not None and age_s(self.now, self.clock()) < STALE_S else None

    @property
    def steps(self) -> int | None:
        """Returns the training steps of the whole run; None where that is not known."""
        life = self.happenings.life
        return self.settings.steps if life is None or life.total is None else life.total

    def eta_s(self) -> float | None:
        """Returns in how many seconds the run is done at the speed of its last steps; None where that is not known."""
        speed = self.happenings.seconds_per_step()
        if self.steps is None or speed is None or not self.live:
            return None
        return max(0, self.steps - self.step) * speed

    def _read_config(self) -> None:
        path = self.run_dir / CONFIG
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if stamp == self._config:
                return
            read = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, yaml.YAMLError, RecursionError):
            return
        self._config = stamp
        content = read if isinstance(read, Mapping) else {}
        name = content.get("name")
        self.settings = Settings(
            name if isinstance(name, str) and name else self.run_dir.name,
            _count(content, "train", "steps"),
            _count(content, "train", "prompts_per_step"),
            _count(content, "rollout", "group_size"),
        )


def _count(content: Mapping[str, Any], section: str, key: str) -> int | None:
    within = content.get(section)
    value = within.get(key) if isinstance(within, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
