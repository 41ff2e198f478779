"""The bounded hand-over between rollouts and training: it holds the open groups, admits more, and gives each step its own.

    room() ----> begin(group) ----> rollout ----> put(group) ----> take(step)
      ^                                              |                |
      +---------- a group ends otherwise  <----------+                |
      +---------- published(version)  <-------------------------------+

What makes a step is decided in `composition`. What was decided by time is written down, and followed by whoever makes the same
step again (`Decisions`): a run that goes on, and another one that is given its journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ctpo_megatron.loop.composition import Candidate, StepRules, oldest_version
from ctpo_megatron.loop.protocols import Decisions
from ctpo_megatron.types import Composition, End, FailedAttempt, Fate, Prompt, TrajectoryGroup


@dataclass(slots=True)
class _Open(Candidate):
    """An open group, and what it holds once it is finished."""

    prompt: str = ""
    made: TrajectoryGroup | None = None


@dataclass(frozen=True, slots=True)
class EndedGroup:
    """A group that ended without being trained on. `made`: what it holds; None where it was not finished."""

    number: int
    end: End
    reason: str
    prompt: str
    made: TrajectoryGroup | None = None

    def fate(self, step: int) -> Fate:
        """Returns it for the record: it ended before `step` was made."""
        return Fate(step, self.end, self.reason, self.prompt, () if self.made is None else tuple(self.made.failed))


@dataclass(frozen=True, slots=True)
class MadeStep:
    """The groups of a training step, ordered by prompt, and those that ended otherwise since the step before."""

    groups: list[TrajectoryGroup]
    ended: list[EndedGroup]


class Undecided:
    """`Decisions` of which none is known and none is kept."""

    def planned(self, _step: int) -> Composition | None:
        """Returns None."""
        return None

    def fate(self, _group: int) -> Fate | None:
        """Returns None."""
        return None

    def decided(self, _made: Composition) -> None:
        """Keep nothing."""

    def drop_plans(self, _step: int) -> None:
        """Drop nothing."""


class GroupBuffer:
    """The open groups of a run that goes on at `first_step` with `admitted` groups, and ends before `last_step`.

    Version v is the policy after v training steps; step s trains version s into s + 1.
    """

    def __init__(
        self, rules: StepRules, *, first_step: int, last_step: int, admitted: int = 0, decisions: Decisions | None = None
    ) -> None:
        self.rules = rules
        self._step = first_step  # the next to be made
        self._last_step = last_step
        self._decisions: Decisions = decisions or Undecided()
        self.version = first_step  # that the servers sample from
        self._open: dict[int, _Open] = {}  # by their numbers, in that order
        self._next = admitted  # no group of this number or a higher one was admitted
        self._ended: dict[int, EndedGroup] = {}  # since the last step
        self._places = 0
        self._changed = asyncio.Event()

    async def room(self, number: int) -> bool:
        """Wait until group `number`, the next one, may begin; returns False when all steps are made."""
        await self._until(lambda: self._done or self._has_room(number))
        return not self._done

    def begin(self, number: int, prompt: Prompt, version: int | None = None) -> tuple[FailedAttempt, ...]:
        """Open a group; `version` None: under the present one. Returns its attempts where it is on record that it has failed."""
        version = self.version if version is None else min(version, self.version)
        self._open[number] = _Open(number, version, prompt=prompt.key)
        self._next = max(self._next, number + 1)
        self._notify()
        fate = self._decisions.fate(number)
        if fate is not None and fate.prompt != prompt.key:  # the data or their order have changed since
            self._decisions.drop_plans(fate.step)
            return ()
        return () if fate is None else fate.attempts

    def put(self, made: TrajectoryGroup) -> None:
        """Hand in a group that came to its end: finished, or with failed attempts."""
        group = self._open[made.id.number]
        oldest = oldest_version(made)
        group.version = group.version if oldest is None else oldest
        group.made, group.place = made, self._places
        self._places += 1
        if (verdict := self._verdict(group)) is not None:
            self._end(group, *verdict)
        self._notify()

    async def take(self, step: int) -> MadeStep:
        """Returns the groups of `step`, which is the next one, once it can be made."""
        await self._until(lambda: self._choice() is not None)
        made = self._made(step, self._choice() or ([], []))
        self._step = step + 1
        for group in [group for group in self._open.values() if group.made and self.rules.too_old(group, self._step)]:
            self._end(group, End.ABORTED, TOO_OLD)
        self._notify()
        return made

    def finished(self) -> int:
        """Returns how many groups that may be part of the next step are finished, at most as many as make one."""
        window = self.rules.window(list(self._open.values()))
        return min(sum(group.place is not None for group in window), self.rules.groups)

    def published(self, version: int) -> None:
        """Note that the servers now sample from `version`."""
        self.version = version
        self._notify()

    @property
    def open(self) -> list[int]:
        """Returns the numbers of the groups that are open."""
        return list(self._open)

    @property
    def _done(self) -> bool:
        return self._step >= self._last_step

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; it still does then, as nobody else runs in between."""
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _has_room(self, number: int) -> bool:
        plan = self._plan()
        if plan is not None and number >= plan.admitted:
            return False
        if plan is not None and self.version == self._step:
            return True
        return len(self._open) < self.rules.room(version=self.version, step=self._step, last_step=self._last_step)

    def _verdict(self, group: _Open) -> tuple[End, str] | None:
        """Returns how a group that was put ends; None: it may be trained on."""
        assert group.made is not None
        if group.made.failed:
            return End.FAILED, next(each.reason for each in group.made.failed if not each.aborted)
        refills = self.rules.max_refills if equal_rewards(group.made) else None
        fate = self._decisions.fate(group.number)
        too_old = fate is not None and fate.end is End.TRAINED and self.rules.too_old(group, max(fate.step, self._step))
        if fate is not None and (too_old or (fate.end is End.FILTERED and refills is None)):  # settings have changed since
            self._decisions.drop_plans(fate.step)
        elif fate is not None:
            return None if fate.end is End.TRAINED else (fate.end, fate.reason)
        if self.rules.too_old(group, self._step):
            return End.ABORTED, TOO_OLD
        if refills is not None and sum(each.end is End.FILTERED for each in self._ended.values()) < refills:
            return End.FILTERED, EQUAL
        return None

    def _end(self, group: _Open, end: End, reason: str) -> None:
        del self._open[group.number]
        self._ended[group.number] = EndedGroup(group.number, end, reason, group.prompt, group.made)

    def _plan(self) -> Composition | None:
        """Returns how the next step was made before; None where it was not, or cannot be made so again."""
        plan = self._decisions.planned(self._step)
        if plan is None:
            return None
        there = all(number in self._open or number >= self._next for number in plan.trained)
        ended = all(number in self._open or number in self._ended or number >= self._next for number in plan.others)
        if there and ended and len(plan.trained) == self.rules.groups:
            return plan
        self._decisions.drop_plans(self._step)
        return None

    def _choice(self) -> tuple[list[int], list[int]] | None:
        """Returns the numbers of the groups that make the next step, and of those that ended; None while it has to wait."""
        plan = self._plan()
        if plan is None:
            chosen = self.rules.choose(list(self._open.values()), self._step)
            return None if chosen is None else (chosen, list(self._ended))
        ready = all(number in self._open and self._open[number].made for number in plan.trained)
        ready = ready and self._ended.keys() >= set(plan.others) and self._next >= plan.admitted
        return (list(plan.trained), plan.others) if ready else None

    def _made(self, step: int, choice: tuple[list[int], list[int]]) -> MadeStep:
        chosen = [self._open.pop(number) for number in choice[0]]
        ended = [self._ended.pop(number) for number in sorted(choice[1])]
        groups = [group.made for group in chosen if group.made is not None]
        groups.sort(key=lambda group: (group.prompt.index, group.id.number))
        for group in groups:
            group.step = step
        fates = {group.number: Fate(step, End.TRAINED, "", group.prompt) for group in chosen}
        fates |= {each.number: each.fate(step) for each in ended}
        self._decisions.decided(Composition(step, tuple(sorted(choice[0])), fates, self._next))
        return MadeStep(groups, ended)


TOO_OLD = "its oldest tokens are older than train.staleness allows"
EQUAL = "all its rewards are equal"


def equal_rewards(group: TrajectoryGroup) -> bool:
    """Returns whether no attempt of a group earned more than another: a baseline of the group learns nothing from it."""
    return len({trajectory.reward for trajectory in group.trajectories}) == 1
