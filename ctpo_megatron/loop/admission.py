"""Which prompt is next, and what its group is called; and where a run goes on: the groups that are open, and the next ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ctpo_megatron.data.mixture import Sampler
from ctpo_megatron.types import GroupId, Prompt, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Admitted:
    """A group that was admitted: its id, its prompt, and the version of the weights that the servers had then."""

    id: GroupId
    prompt: Prompt
    version: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where to go on: the groups that are open, the number of the next one, and the sampler that its prompt comes from."""

    groups: int
    cursor: dict[str, Any]
    open: tuple[Admitted, ...] = ()

    @property
    def ended(self) -> int:
        """Returns how many groups have ended, however that was."""
        return self.groups - len(self.open)


class Admission:
    """Hands out prompts with the ids of their groups: which prompt a number gets depends on the sampler alone, not on time.

    `groups`: how many were handed out before. `reopened`: those of them that are open where the run goes on; they begin first,
    under the ids that they have.
    """

    def __init__(self, sampler: Sampler, groups: int = 0, reopened: Iterable[Admitted] = ()) -> None:
        self._sampler = sampler
        self._groups = groups
        self.reopened = tuple(reopened)

    def next(self, version: int) -> Admitted:
        """Returns the next group, which is admitted under `version`."""
        (prompt,) = self._sampler.next(1)
        admitted = Admitted(GroupId(self._groups), prompt, version)
        self._groups += 1
        return admitted

    def observe(self, groups: Iterable[TrajectoryGroup]) -> None:
        """Let the sampler know what `groups`, of a step or filtered before it, earned. It chooses later prompts by that."""
        ordered = sorted(groups, key=lambda group: group.id.number)
        self._sampler.observe([(group.prompt, fmean(t.reward for t in group.trajectories)) for group in ordered])

    @property
    def groups(self) -> int:
        """Returns how many groups were handed out: the number of the next one."""
        return self._groups

    def position(self, open_groups: Iterable[Admitted]) -> Position:
        """Returns the present position, while `open_groups` are open."""
        return Position(self._groups, self._sampler.state(), tuple(open_groups))
