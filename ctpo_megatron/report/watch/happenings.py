"""events.jsonl as it grows: where the run stands, its incarnations, what is amiss, and the last things that happened."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ctpo_megatron.record.events import CheckpointVerified, EvaluationDone, RunReady, StepTrained, WeightsPublished
from ctpo_megatron.record.goodput import PHASES, USEFUL
from ctpo_megatron.record.nonfinite_events import WentBack
from ctpo_megatron.record.run_events import StopRequested, TrainerRestarted, TrainerRestarting
from ctpo_megatron.record.sentences import sentence
from ctpo_megatron.record.story_events import GoodputMeasured, IncarnationBegan, IncarnationEnded

RAISED, CLEARED = "alarm raised", "alarm cleared"
REMEMBERED = 50  # events besides those that are shown as numbers
STEPS = 50  # that speeds and shares are taken from
QUIET = frozenset({StepTrained.name, WeightsPublished.name, EvaluationDone.name, CheckpointVerified.name})  # shown as numbers


class _Head(msgspec.Struct, gc=False):
    time: float
    event: str


@dataclass(frozen=True, slots=True)
class Told:
    """An event for a person. `time`: seconds since 1970."""

    time: float
    name: str
    fields: Mapping[str, Any]

    @property
    def sentence(self) -> str:
        """Returns it in one line."""
        return " ".join(sentence(self.name, self.fields).split())


@dataclass(slots=True)
class Life:
    """One incarnation: when it began and from which step, when its processes were up, and how it ended. None: not yet."""

    number: int
    began: float
    step: int
    total: int | None = None  # training steps of the whole run, where its settings do not say it
    ready: float | None = None
    how: str | None = None
    reason: str = ""
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step that is done. `time`: when it was; `seconds`: in which; `phases`: of these."""

    time: float
    step: int
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


class Happenings:
    """What the lines say that were taken up with `take`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all: the file is another one now."""
        self.lives: list[Life] = []
        self.ends: Counter[str] = Counter()  # of incarnations
        self.recent: deque[Told] = deque(maxlen=REMEMBERED)
        self.steps: deque[StepTime] = deque(maxlen=STEPS)  # of the last incarnation
        self.alarms: dict[tuple[str, str], Told] = {}  # that are up
        self.step = 0  # training steps that are done
        self.version: int | None = None  # published last
        self.saved: int | None = None  # step of the newest verified checkpoint
        self.goodput: float | None = None  # of all incarnations that ended
        self.stopping: str = ""  # why the run is to stop
        self.trainer_lost = False  # it is being started again
        self.time: float | None = None  # of the newest event
        self.unreadable = 0

    @property
    def life(self) -> Life | None:
        """Returns the last incarnation; None of a run that tells of none."""
        return self.lives[-1] if self.lives else None

    def seconds_per_step(self) -> float | None:
        """Returns the mean time from one step's end to the next over the last steps, with evaluations and checkpoints in it."""
        if len(self.steps) > 1 and self.steps[-1].step > self.steps[0].step:
            return (self.steps[-1].time - self.steps[0].time) / (self.steps[-1].step - self.steps[0].step)
        return self.steps[-1].seconds if self.steps else None

    def phases(self) -> dict[str, float]:
        """Returns the seconds that the last steps took by phase, in the mean, in the order of a step."""
        found: dict[str, float] = {}
        for each in self.steps:
            for phase, seconds in each.phases.items():
                found[phase] = found.get(phase, 0.0) + seconds / len(self.steps)
        return found

    def useful(self) -> float | None:
        """Returns the share of the last steps that went into rollouts and training; None where there is none."""
        whole = sum(each.seconds for each in self.steps)
        parts = sum(seconds for each in self.steps for phase, seconds in each.phases.items() if PHASES.get(phase) in USEFUL)
        return parts / whole if whole > 0 else None

    def take(self, line: bytes) -> None:
        """Take up a line of the file; one that is no event is counted as unreadable."""
        try:
            head = _HEAD.decode(line)
            fields = msgspec.json.decode(line)
            self.time = head.time
            self._take(Told(head.time, head.event, {key: fields[key] for key in fields if key not in ("time", "event")}))
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
            self.unreadable += 1

    def _take(self, told: Told) -> None:
        fields = told.fields
        if told.name not in QUIET:
            self.recent.append(told)
        match told.name:
            case StepTrained.name:
                self.step = int(fields["step"])
                self.steps.append(StepTime(told.time, self.step, float(fields["seconds"]), fields.get("phases") or {}))
            case WeightsPublished.name:
                self.version = int(fields["version"])
            case IncarnationBegan.name:
                total = fields.get("total")
                self._begin(Life(int(fields["number"]), told.time, int(fields["step"]), None if total is None else int(total)))
            case IncarnationEnded.name:
                self._end(fields)
            case RunReady.name if self.life is not None:
                self.life.ready = told.time
            case CheckpointVerified.name:
                self.saved = int(fields["step"])
            case TrainerRestarting.name:
                self.trainer_lost = True
            case TrainerRestarted.name:
                self.trainer_lost = False
                self._back(int(fields["step"]))
            case WentBack.name:
                self._back(int(fields["step"]))
            case EvaluationDone.name if not self.lives:
                self.step = max(self.step, int(fields["step"]))
            case GoodputMeasured.name:
                self.goodput = float(fields["goodput"])
            case StopRequested.name:
                self.stopping = str(fields["reason"])
            case _ if told.name == RAISED:
                self.alarms[alarm(told)] = told
            case _ if told.name == CLEARED:
                self.alarms.pop(alarm(told), None)

    def _back(self, step: int) -> None:
        self.step = step
        self.steps.clear()

    def _begin(self, life: Life) -> None:
        self.lives.append(life)
        self.stopping, self.trainer_lost = "", False
        self._back(life.step)

    def _end(self, fields: Mapping[str, Any]) -> None:
        number = int(fields["number"])
        for life in self.lives[-2:]:  # of one that was killed the next one tells
            if life.number == number:
                life.how, life.reason, life.ended = str(fields["how"]), str(fields.get("reason", "")), float(fields["at"])
                self.ends[life.how] += 1


def alarm(told: Told) -> tuple[str, str]:
    """Returns which alarm an event is about, and where: of a metric, or a server."""
    return str(told.fields.get("alarm", "")), str(told.fields.get("where", ""))


_HEAD = msgspec.json.Decoder(_Head)
