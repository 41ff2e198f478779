"""Goodput: how much of a run's time went into what it keeps, and where the rest went.

    useful     rollout, rollout tail, train: generating and training for steps that are part of the final history
    allocated  every second from the beginning of an allocation to its end: SLURM's, where that is known, else the process's
    goodput    useful / allocated

The rollout tail is the waiting after 80 % of a step's groups are in. It is useful, as its groups are trained on, and shown apart,
as most servers and the trainer idle in it. A step that was trained and is not part of the final history, because the run went
back to a checkpoint before it, is lost work with all its seconds. Every second has exactly one cause.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.record.events import CheckpointVerified, EvaluationDone, RunReady, RunResumed, StepTrained
from ctpo_megatron.record.run_events import StopRequested, TrainerRestarted, TrainerRestarting
from ctpo_megatron.record.story import Happened, Incarnation, Story
from ctpo_megatron.record.story_events import GoodputMeasured
from ctpo_megatron.record.timeline import Timeline
from ctpo_megatron.record.watch_events import StallFound


class Cause(enum.StrEnum):
    """What a second went into."""

    ROLLOUT = "rollout"  # waiting for a step's groups, until 80 % of them are in
    TAIL = "rollout tail"  # and from then on
    TRAIN = "train"  # advantages, packing, log-probs, gradients, optimizer steps
    PUBLISH = "publish"  # weights to the servers; their memory given back and taken again
    EVALUATE = "evaluate"
    CHECKPOINT = "checkpoint"  # standing still for one
    OTHER = "other"  # of a step, between its phases; and the step under way of a run that goes on
    STALL = "stall"  # something hung, until it was noticed and dealt with; the disk took nothing, until it was mended
    LOST = "lost work"  # steps that are not part of the final history, and the one that was under way at the end
    START = "start"  # of the first incarnation, until the first step may begin
    RESTART = "restart"  # of the later ones; and the time between two in one allocation
    STOP = "stop"  # from the wish to stop, or the last step, to the end
    WAIT = "requeue wait"  # between two allocations: nothing is allocated


USEFUL = frozenset({Cause.ROLLOUT, Cause.TAIL, Cause.TRAIN})
PHASES = {  # of a step, as its event names them
    "rollout": Cause.ROLLOUT,
    "batch": Cause.TRAIN,
    "train": Cause.TRAIN,
    "sleep": Cause.PUBLISH,
    "publish": Cause.PUBLISH,
    "evaluate": Cause.EVALUATE,
    "measure": Cause.EVALUATE,  # of `ctpo sft`: held-out losses
    "checkpoint": Cause.CHECKPOINT,
    "storage": Cause.STALL,
}
_LONGEST_S = 1e12  # beyond which a time is no time any more
_NOTHING_DONE = -1  # of the state of a run that begins anew: not even the evaluation of step 0 stays


@dataclass(frozen=True, slots=True)
class Account:
    """How a stretch of time was spent: milliseconds by cause."""

    milliseconds: Mapping[Cause, int]

    @property
    def seconds(self) -> dict[Cause, float]:
        """Returns seconds of every cause, in the order of the causes."""
        return {cause: self.milliseconds.get(cause, 0) / 1000 for cause in Cause}

    @property
    def elapsed(self) -> int:
        """Returns all milliseconds."""
        return sum(self.milliseconds.values())

    @property
    def allocated(self) -> int:
        """Returns the milliseconds in which the run had its nodes."""
        return self.elapsed - self.milliseconds.get(Cause.WAIT, 0)

    @property
    def useful(self) -> int:
        """Returns the useful milliseconds."""
        return sum(self.milliseconds.get(cause, 0) for cause in USEFUL)

    @property
    def goodput(self) -> float:
        """Returns the share of the allocated time that was useful; 0 of nothing."""
        return self.useful / self.allocated if self.allocated else 0.0

    def shares(self, *, allocated: bool) -> dict[Cause, float]:
        """Returns each cause's share of the allocated or of the elapsed time; they add up to 1, or are 0 where there is none."""
        whole = self.allocated if allocated else self.elapsed
        parts = {cause: 0 if allocated and cause is Cause.WAIT else self.milliseconds.get(cause, 0) for cause in Cause}
        return {cause: part / whole if whole else 0.0 for cause, part in parts.items()}

    def summary(self) -> dict[str, Any]:
        """Returns it for summary.json."""
        seconds = {str(cause): value for cause, value in self.seconds.items()}
        return {"goodput": self.goodput, "useful_s": self.useful / 1000, "allocated_s": self.allocated / 1000, "seconds": seconds}


@dataclass(frozen=True, slots=True)
class Goodput:
    """The account of each incarnation by its number, and of all of them with the waiting between."""

    incarnations: Mapping[int, Account]
    total: Account

    def summary(self) -> dict[str, Any]:
        """Returns it for summary.json."""
        each = {number: account.summary() for number, account in self.incarnations.items()}
        return {**self.total.summary(), "elapsed_s": self.total.elapsed / 1000, "incarnations": each}

    def event(self) -> GoodputMeasured:
        """Returns it as an event."""
        total = self.total
        seconds = {str(cause): value for cause, value in total.seconds.items()}
        return GoodputMeasured(
            goodput=total.goodput,
            useful=total.useful / 1000,
            allocated=total.allocated / 1000,
            elapsed=total.elapsed / 1000,
            incarnations=len(self.incarnations),
            seconds=seconds,
        )


def account(story: Story, now: float | None = None, *, done: bool = False) -> Goodput:
    """Returns how the time of `story` was spent.

    The last incarnation reaches to `now`, seconds since 1970, where its end is not written, and without `now` to its last event.
    `done`: it has trained its last step. Steps beyond the last verified checkpoint of a story that ends in a failure count as
    lost already.
    """
    lost = set(_lost_steps(story))
    accounts: dict[int, Account] = {}
    waited, end, previous = 0, None, None
    for incarnation in story.incarnations:
        begin, first = _beginning(incarnation), end is None
        if end is not None:
            begin = end if previous is not None and _same_allocation(previous, incarnation) else max(begin, end)
            waited += begin - end
        is_last = incarnation is story.incarnations[-1]
        end = max(begin, _ending(incarnation, now if is_last else None))
        background = Cause.START if first else Cause.RESTART
        line = Timeline(begin, end, background)
        _paint(line, incarnation, lost, done=done and is_last)
        accounts[incarnation.number] = Account(line.totals())
        previous = incarnation
    total: Counter[Cause] = Counter({Cause.WAIT: waited})
    for each in accounts.values():
        total.update(each.milliseconds)
    return Goodput(accounts, Account(total))


def _beginning(incarnation: Incarnation) -> int:
    """Returns when its allocation began."""
    fields = incarnation.began.fields
    known = [_number(fields.get(name)) for name in ("allocated", "process")]
    return _ms(min([each for each in known if each > 0.0], default=incarnation.began.time))


def _ending(incarnation: Incarnation, now: float | None) -> int:
    ended = incarnation.ended
    if ended is not None and (at := _number(ended.fields.get("at"))) > 0.0:
        return _ms(at)
    return _ms(max([each.time for each in incarnation.events], default=0.0) if now is None else now)


def _same_allocation(one: Incarnation, other: Incarnation) -> bool:
    """Whether SLURM gave both the same nodes; without SLURM a process is an allocation of its own, also where it begins anew."""
    fields = [each.began.fields for each in (one, other)]
    jobs = [(each.get("job"), each.get("restarts")) for each in fields]
    processes = [(each.get("host"), each.get("pid"), each.get("process")) for each in fields]
    return jobs[0] == jobs[1] and (jobs[0][0] is not None or processes[0] == processes[1])


def _paint(line: Timeline[Cause], incarnation: Incarnation, lost: set[int], *, done: bool) -> None:
    ready = incarnation.first(RunReady.name)
    if ready is not None:
        steps = [each for each in incarnation.events if each.name == StepTrained.name]
        latest = max(_ms(each.time) for each in (ready, *steps))
        line.paint(_ms(ready.time), line.end, Cause.OTHER)
        for begin, end, cause in _ends(latest, line.end, incarnation, done=done):
            line.paint(begin, end, cause)
        for event in incarnation.events:
            if event.name == TrainerRestarting.name:  # what was under way then
                since = max(_ms(each.time) for each in (ready, *steps) if each.time <= event.time or each is ready)
                line.paint(since, _ms(event.time), Cause.LOST)
        for event in incarnation.events:
            if event.name == EvaluationDone.name:  # those of a step are in its phases, and painted over
                line.paint(*_reach(event), Cause.LOST if id(event) in lost else Cause.EVALUATE)
        for event in steps:
            _paint_step(line, event, is_lost=id(event) in lost)
    for event in incarnation.events:
        if event.name == StallFound.name and event.fields.get("acts") is True:
            line.paint(*_reach(event), Cause.STALL)
        if event.name == TrainerRestarted.name:
            line.paint(*_reach(event), Cause.RESTART)


def _ends(latest: int, end: int, incarnation: Incarnation, *, done: bool) -> Iterator[tuple[int, int, Cause]]:
    """Yields what the time after the last whole step went into; nothing for a run that goes on."""
    how = "done" if done else incarnation.how
    asked = incarnation.first(StopRequested.name)
    if how == "done":
        yield latest, end, Cause.STOP
    elif how == "stopped":  # what was under way is saved, and trained on later
        yield latest, end, Cause.ROLLOUT
    elif how is not None:
        yield latest, end, Cause.LOST
    if how in ("stopped", "cancelled") and asked is not None:
        yield _ms(asked.time), end, Cause.STOP


def _reach(event: Happened) -> tuple[int, int]:
    """Returns when what ended with `event` began, and when it ended."""
    end = _ms(event.time)
    return end - _ms(_number(event.fields.get("seconds"))), end


def _paint_step(line: Timeline[Cause], event: Happened, *, is_lost: bool) -> None:
    """Lay out a step that ended when its event was written: its phases one after another, then what lay between them."""
    begin, end = _reach(event)
    line.paint(begin, end, Cause.LOST if is_lost else Cause.OTHER)
    if is_lost:
        return
    parts = list(_parts(event.fields))
    whole = sum(seconds for _, seconds in parts)
    scale = min(1.0, (end - begin) / 1000 / whole) if whole > 0.0 else 0.0
    done = 0.0
    for cause, seconds in parts:
        line.paint(begin + _ms(done * scale), begin + _ms((done + seconds) * scale), cause)
        done += seconds


def _parts(fields: Mapping[str, Any]) -> Iterator[tuple[Cause, float]]:
    """Yields the causes of a step's phases, with their seconds."""
    phases = fields.get("phases")
    for phase, value in phases.items() if isinstance(phases, Mapping) else ():
        seconds, cause = _number(value), PHASES.get(phase, Cause.OTHER)
        tail = min(seconds, _number(fields.get("rollout_tail"))) if cause is Cause.ROLLOUT else 0.0
        yield cause, seconds - tail
        if tail:
            yield Cause.TAIL, tail


def _lost_steps(story: Story) -> Iterator[int]:
    """Yields the identities of the events of steps and evaluations that are not part of the final history.

    A step is lost where the run later goes back behind it: it resumes at an earlier step, begins anew, or trains it again.
    """
    kept = _kept_in_the_end(story)
    for incarnation in reversed(story.incarnations):
        for event in reversed(incarnation.events):
            step = _number(event.fields.get("step"))
            if event.name in (StepTrained.name, EvaluationDone.name) and step > kept:
                yield id(event)
            if event.name in (StepTrained.name, RunResumed.name):
                kept = min(kept, step - 1 if event.name == StepTrained.name else step)
        if incarnation.began.fields.get("checkpoint") is not None:
            kept = min(kept, _number(incarnation.began.fields.get("step")))
        elif incarnation.first(RunReady.name) is not None:
            kept = _NOTHING_DONE


def _kept_in_the_end(story: Story) -> float:
    """Returns the last step that is safe in the end: all of a run that goes on, is done or was stopped in order."""
    worked = [each for each in story.incarnations if each.first(RunReady.name) is not None]
    if not worked or worked[-1].how in (None, "done", "stopped"):
        return math.inf
    last = worked[-1]
    safe = [_number(event.fields.get("step")) for event in last.events if event.name == CheckpointVerified.name]
    return max([*safe, _number(last.began.fields.get("step"))])


def _number(value: Any) -> float:
    """Returns a number of an event; 0 for what is none, is negative or not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if is_number else 0.0


def _ms(seconds: float) -> int:
    return round(max(-_LONGEST_S, min(seconds, _LONGEST_S)) * 1000)
