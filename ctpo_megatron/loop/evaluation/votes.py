"""Which attempts at a problem gave the same answer, by the grader that rewards are given by and not by how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctpo_megatron.rollout.protocols import Grader
from ctpo_megatron.types import Trajectory

RIGHT = 0  # the class of the right answer


@dataclass(frozen=True, slots=True)
class Votes:
    """The class of each attempt's answer: 0 the right one, 1 and so on wrong ones as they first came, None where there is none.

    `undecided`: comparisons of two answers that came to no end; these two count as different.
    """

    classes: tuple[int | None, ...]
    undecided: int = 0

    @property
    def right(self) -> int:
        """Returns how many attempts gave the right answer."""
        return self.classes.count(RIGHT)

    @property
    def silent(self) -> int:
        """Returns how many gave none."""
        return self.classes.count(None)

    @property
    def wrong(self) -> list[int]:
        """Returns how many gave each of the wrong answers."""
        voted = [each for each in self.classes if each is not None]
        return [voted.count(each) for each in range(RIGHT + 1, max(voted, default=RIGHT) + 1)]


async def count_votes(attempts: Sequence[Trajectory], grader: Grader) -> Votes:
    """Returns the votes of the attempts at one problem.

    What the grader found equal to the right answer is one class. A wrong answer joins the first class whose first answer it
    equals: equality by the grader is not always transitive (50 % equals 0.5 and 50), so that the order decides there.
    """
    classes: list[int | None] = []
    firsts: list[str] = []  # of the wrong classes
    undecided = 0
    for attempt in attempts:
        if attempt.given is None or is_right(attempt):
            classes.append(RIGHT if is_right(attempt) else None)
            continue
        for number, first in enumerate(firsts):
            verdict = True if first == attempt.given else await grader.same(first, attempt.given)
            undecided += verdict is None
            if verdict:
                classes.append(number + 1)
                break
        else:
            firsts.append(attempt.given)
            classes.append(len(firsts))
    return Votes(tuple(classes), undecided)


def is_right(attempt: Trajectory) -> bool:
    """Whether the attempt counts as right for pass@k and maj@k: its answer is worth all that can be had."""
    return attempt.rightness >= 1.0
