"""Which prompt is next, what its group is called, and how far both had come after each training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.types import GroupId, Prompt


@dataclass(frozen=True, slots=True)
class Position:
    """Where to go on: the number of the next group, and the state of the sampler that its prompt comes from."""

    groups: int
    cursor: dict[str, Any]


class Admission:
    """Hands out prompts with the ids of their groups. Steps are admitted in order, each with exactly its own groups.

    Rollouts run ahead of training, so the position that a checkpoint needs is not the present one: it is kept for every step
    until `forget`. Groups that were admitted and not trained on when a run ended are admitted again, under the same ids.
    """

    def __init__(self, sampler: PromptSampler, groups: int = 0) -> None:
        self._sampler = sampler
        self._groups = groups
        self._after: dict[int, Position] = {}

    def next(self, step: int) -> tuple[GroupId, Prompt]:
        """Returns the next group of training step `step`, counted from 0."""
        (prompt,) = self._sampler.next(1)
        group = GroupId(self._groups)
        self._groups += 1
        self._after[step] = Position(self._groups, self._sampler.state())
        return group, prompt

    @property
    def groups(self) -> int:
        """Returns how many groups were handed out."""
        return self._groups

    def after(self, step: int) -> Position:
        """Returns the position behind the last group of `step`. Raises KeyError for a step without groups, or a forgotten one."""
        return self._after[step]

    def forget(self, step: int) -> None:
        """Drop the positions of the steps before `step`."""
        self._after = {kept: position for kept, position in self._after.items() if kept >= step}
