"""A reward that is the sum of several, each by its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctpo_megatron.rollout.protocols import Grader, Outcome, Reward, Score
from ctpo_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class Term:
    """One reward among several."""

    name: str
    weight: float
    reward: Reward
    judges_answers: bool  # whether it looks at the answer, and not only at how it was given


class Combination:
    """The weighted sum of `terms`. It is undecided where one of them is: a part alone would be another reward.

    The first term that judges answers says which answer was given, and what it alone is worth. `grader` compares answers.
    """

    def __init__(self, terms: Sequence[Term], grader: Grader) -> None:
        self._terms, self._grader = terms, grader
        self._main = next((term.name for term in terms if term.judges_answers), None)

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`."""
        total, numbers, given, accuracy = 0.0, dict[str, float](), None, None
        # one after the other, as they stand: a judge that costs money is not asked about what an earlier term could not decide
        for term in self._terms:
            score = await term.reward.score(prompt, outcome)
            numbers |= {f"{term.name}_{name}": value for name, value in score.terms.items()}
            if term.name == self._main:
                given, accuracy = score.given, score.reward if score.accuracy is None else score.accuracy
            if score.undecided:
                why = f"{term.name}: {score.why}"
                return Score(0.0, undecided=True, given=given, why=why, terms=numbers, accuracy=accuracy)
            numbers[term.name] = score.reward
            total += term.weight * score.reward
        return Score(total, given=given, terms=numbers, accuracy=accuracy)

    async def same(self, one: str, other: str) -> bool | None:
        """Returns whether two answers are equal, as the first term that judges answers sees it."""
        return await self._grader.same(one, other)
