"""Which groups make a training step: the one place that decides it.

Groups are numbered as they are admitted, and are open until they end. Step s trains version s of the weights into s + 1. It is
made of `groups` of the `groups + oversample` open groups with the lowest numbers, the window:

    all that are due     admitted under version s - staleness: one step later they would be too old
    then the rest        in the order in which they were finished

What is left of the window stays open, goes on, and is in the window of the next step. Without over-sampling the window is the
step: a step waits for exactly its own groups, and none is favoured for being quick. A group that ended otherwise (filtered,
failed) has left the window, and the next number has taken its place.

Why the bound holds: groups are admitted only up to `room`, so at most staleness * groups are open when version s is published
that were admitted under a version before it, and at most `oversample` <= `groups` of those that a window held are still open a
step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctpo_megatron.config import RunConfig
from ctpo_megatron.types import TrajectoryGroup


@dataclass(slots=True)
class Candidate:
    """An open group, as far as the decision needs it."""

    number: int
    version: int  # the oldest that one of its tokens may be of: the one under which it was admitted; of a finished one: is of
    place: int | None = None  # among the finished ones, in the order of their ends; None: it is not finished


@dataclass(frozen=True, slots=True)
class StepRules:
    """What a step is made of.

    `max_refills`: how many groups with equal rewards are replaced for a step; those beyond it are trained on. None: none is
    replaced.
    """

    groups: int
    staleness: int
    oversample: int = 0
    max_refills: int | None = None

    @classmethod
    def of(cls, config: RunConfig) -> StepRules:
        """Returns the rules that a run is configured for."""
        train, refills = config.train, config.rollout.dynamic.max_refills
        return cls(train.prompts_per_step, train.staleness, train.oversample, refills or None)

    @property
    def ahead(self) -> int:
        """Returns the steps that rollouts run ahead of training. Groups that go on take one version of the staleness."""
        return self.staleness - 1 if self.oversample else self.staleness

    def room(self, *, version: int, step: int, last_step: int) -> int:
        """Returns how many groups may be open while the servers sample from `version` and `step` is the next to be made.

        The run ends before `last_step`; none is admitted that it could not train on.
        """
        return min((version + self.ahead - step + 1) * self.groups + self.oversample, (last_step - step) * self.groups)

    def too_old(self, group: Candidate, step: int) -> bool:
        """Returns whether `group` may not be trained on in `step` any more."""
        return group.version + self.staleness < step

    def carried(self, groups: Sequence[TrajectoryGroup], step: int) -> int:
        """Returns how many `groups` of a step had gone on: they have tokens that are older than running ahead makes them."""
        oldest = [oldest_version(group) for group in groups]
        return sum(version < step - self.ahead for version in oldest if version is not None)

    def window(self, groups: Sequence[Candidate]) -> Sequence[Candidate]:
        """Returns those of the open `groups`, which are in the order of their numbers, that a step is chosen from."""
        return groups[: self.groups + self.oversample]

    def choose(self, groups: Sequence[Candidate], step: int) -> list[int] | None:
        """Returns the numbers of the groups that make `step`; None while it has to wait for some of the open `groups`."""
        window = self.window(groups)
        due = {group.number for group in window if group.version + self.staleness <= step}
        if any(group.place is None for group in window if group.number in due):
            return None
        finished = [(group.number not in due, group.place, group.number) for group in window if group.place is not None]
        if len(finished) < self.groups:
            return None
        return [number for *_, number in sorted(finished)[: self.groups]]


def oldest_version(group: TrajectoryGroup) -> int | None:
    """Returns the oldest version that sampled a token of `group`; None where it holds no token."""
    turns = [turn for trajectory in group.trajectories for turn in trajectory.all_turns if turn.role == "assistant"]
    return min((version for turn in turns for version in turn.versions), default=None)
