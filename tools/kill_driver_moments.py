"""When a driver is to be killed, and what its run directory says it is doing.

A moment is a phase of a training step and a share of the time that this phase usually takes. It is waited for from outside: the
run knows nothing of it. So a kill may come a little later than it was meant; what the directory showed then is told with it.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_ledger import Sizes, finished

from ctpo_megatron.checkpoints.files import RUN, work_directory
from ctpo_megatron.loop.checkpoints import checkpoint_directory
from ctpo_megatron.record.segments import segments
from ctpo_megatron.types import AttemptId

PHASES = ("start", "rollout", "train", "publish", "evaluate", "save", "end")
USUAL_S = {"start": 25.0, "rollout": 1.5, "train": 0.4, "publish": 0.1, "evaluate": 0.4, "save": 0.4, "end": 1.0}  # at first
KILLING_S = 0.1  # to see that a moment has come, and what there is below the driver


@dataclass(frozen=True)
class Moment:
    """In `phase` of training step `step`, counted from 1; of a start: on the way there. `share`: of the phase, that is over."""

    phase: str
    step: int
    share: float

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}" if self.phase not in ("start", "end") else self.phase


def draw(kills: int, seed: int, steps: int, *, evaluate: int, save: int) -> list[Moment]:
    """Moments in the order in which a run comes to them, as many of each phase. `evaluate`, `save`: after every so many steps."""
    draws = random.Random(seed)
    due = {"evaluate": [0, *range(evaluate, steps + 1, evaluate)], "save": [*range(save, steps + 1, save)], "end": [steps]}
    moments = []
    for number in range(kills):
        phase = PHASES[number % len(PHASES)]
        moments.append(Moment(phase, draws.choice(due.get(phase, [*range(1, steps + 1)])), draws.random()))
    return sorted(moments, key=lambda each: (each.step, PHASES.index(each.phase), each.share))


class Progress:
    """What a run directory says of the process that works in it now. `begun`: when that was started, seconds since 1970."""

    def __init__(self, run_dir: Path, sizes: Sizes, begun: float) -> None:
        self._run_dir, self._sizes, self._begun = run_dir, sizes, begun
        self._events, self._read = run_dir / "events.jsonl", 0
        self._finished: dict[str, set[AttemptId]] = {}
        self._usual: dict[str, list[float]] = defaultdict(list)
        self.happened: list[dict[str, Any]] = []  # in this process's time
        self.look()

    def look(self) -> None:
        """See what has happened since the last look."""
        if not self._events.exists():
            return
        with self._events.open(encoding="utf-8") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        for event in map(json.loads, whole.splitlines()):
            self._learn(event)
            if event["time"] >= self._begun:
                self.happened.append(event)

    def _learn(self, event: dict[str, Any]) -> None:
        for phase, seconds in event.get("phases", {}).items():
            self._usual[phase].append(seconds)
        for name, phase in (("ready", "start"), ("checkpoint verified", "save")):
            if event["event"] == name:
                self._usual[phase].append(event["seconds"])

    def usual_s(self, phase: str) -> float:
        """The median of what this phase took in this run; a guess where it is not known yet."""
        known = self._usual.get(phase)
        return statistics.median(known) if known else USUAL_S[phase]

    def _last(self, name: str, key: str) -> int:
        return max([event[key] for event in self.happened if event["event"] == name], default=-1)

    @property
    def ready(self) -> bool:
        """Whether it has come up."""
        return any(event["event"] == "ready" for event in self.happened)

    @property
    def done(self) -> int:
        """Training steps behind it."""
        return max(0, self._last("resumed", "step"), self._last("step", "step"))

    @property
    def published(self) -> int:
        """The version on the servers; -1: none yet."""
        return self._last("published", "version")

    def sampled(self, step: int) -> bool:
        """Whether all attempts of training step `step` are finished."""
        newest = segments(self._run_dir / "journal")[-1:]
        for path in segments(self._run_dir / "journal"):
            if path in newest or path.name not in self._finished:
                self._finished[path.name] = set(finished(path))
        wanted, known = self._sizes.groups_of(step), set[AttemptId]().union(*self._finished.values())
        return sum(str(attempt.group) in wanted for attempt in known) == self._sizes.groups * self._sizes.attempts

    def saving(self, step: int) -> bool:
        """Whether this process writes the checkpoint after `step` steps now."""
        run = work_directory(checkpoint_directory(self._run_dir / "checkpoints", step)) / RUN
        try:
            return run.stat().st_mtime >= self._begun
        except FileNotFoundError:
            return False

    def opened(self, moment: Moment) -> bool:
        """Whether the phase of `moment` has begun, as far as can be seen."""
        phase, step = moment.phase, moment.step
        if phase == "start":
            return True
        if phase == "end":
            return self.ready and self.done >= self._sizes.steps
        if phase == "evaluate":
            return self.ready and self.published >= step
        if phase == "save":
            return self.saving(step)
        if not self.ready or self.done < step - 1:
            return False
        return phase == "rollout" or self.sampled(step)

    def passed(self, moment: Moment) -> bool:
        """Whether the run is beyond `moment` already."""
        phase, step = moment.phase, moment.step
        if phase == "start":
            return self.ready
        if phase == "end":
            return False
        if phase == "save":
            return self.done > step or self._last("checkpoint verified", "step") >= step
        if phase == "evaluate":
            return self.done > step or self._last("evaluation", "step") >= step
        return self.done >= step

    def waits_s(self, moment: Moment) -> float:
        """How long after its phase has begun `moment` comes, in seconds."""
        before = self.usual_s("train") if moment.phase == "publish" else 0.0  # these two look alike from outside
        return max(0.0, before + moment.share * self.usual_s(moment.phase) - KILLING_S)

    def shown(self) -> str:
        """What the process does, in words."""
        if not self.ready:
            return "start"
        if self.done >= self._sizes.steps:
            return "end"
        step = self.done + 1
        beside = next((f", saving {each}" for each in (step, step - 1) if self.saving(each)), "")
        if self.published >= step:
            return f"evaluating or saving step {step}{beside}"
        return (f"training or publishing step {step}" if self.sampled(step) else f"rollout of step {step}") + beside


def kinds(shown: Sequence[str]) -> dict[str, int]:
    """How often each kind of work was met."""
    counts: dict[str, int] = defaultdict(int)
    for each in shown:
        counts[each.partition(" of step")[0].partition(" step")[0].partition(",")[0]] += 1
        counts["a checkpoint under way"] += "saving" in each.partition(",")[2]
    return dict(counts)
