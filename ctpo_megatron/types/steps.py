"""What becomes of groups, and which of them make a training step."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ctpo_megatron.types.attempts import FailedAttempt


class End(enum.StrEnum):
    """What became of a group that was admitted."""

    TRAINED = "trained"
    FILTERED = "filtered"  # all its rewards are equal, and another one took its place
    FAILED = "failed"  # one of its attempts failed too often, and another one took its place
    ABORTED = "aborted"  # it can be trained on no more


@dataclass(frozen=True, slots=True)
class Fate:
    """How a group ended, and why, and before which training step, or in it. `attempts`: of one that failed."""

    step: int
    end: End
    reason: str
    prompt: str  # `Prompt.key`
    attempts: tuple[FailedAttempt, ...] = ()


@dataclass(frozen=True, slots=True)
class Composition:
    """Which groups make training step `step`, counted from 0, and what became of others since the step before.

    Which group is finished first is a matter of time, so it is written down, for whoever makes the same step again.
    """

    step: int
    trained: tuple[int, ...]  # numbers of its groups
    fates: dict[int, Fate] = field(default_factory=dict)  # of these, and of the others, by their numbers
    admitted: int = 0  # groups by then: the prompts of the next ones were chosen knowing what this step earned

    @property
    def others(self) -> list[int]:
        """Returns the numbers of the groups that ended otherwise."""
        return [number for number in self.fates if number not in self.trained]
