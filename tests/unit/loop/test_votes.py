"""Answers vote together where the grader finds them equal, however they are written."""

from __future__ import annotations

import asyncio

import pytest

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.loop.evaluation.results import Problem
from ctpo_megatron.loop.evaluation.votes import Votes, count_votes
from ctpo_megatron.rollout.protocols import Outcome
from ctpo_megatron.rollout.rewards.math import MathReward
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, Trajectory, TrajectoryGroup

PROMPT = Prompt(0, ({"role": "user", "content": "?"},), r"\frac{1}{2}")


def attempt(number: int, given: str | None, reward: float) -> Trajectory:
    return Trajectory(0, [1], [], Status.FINISHED, given=given, reward=reward, id=AttemptId(GroupId(0, 0), number))


@pytest.mark.thorough
def test_by_the_real_grader_and_not_by_the_text() -> None:
    texts = [
        r"\boxed{0.5}",
        r"\boxed{\frac{2}{3}}",
        r"\boxed{\frac{4}{6}}",
        r"\boxed{2/3}",
        r"\boxed{\dfrac12}",
        "none",
        r"\boxed{7}",
    ]

    async def scenario() -> tuple[list[Trajectory], Votes]:
        grader = MathReward(MathRewardConfig())
        try:
            scores = [await grader.score(PROMPT, Outcome(text)) for text in texts]
            attempts = [attempt(number, score.given, score.reward) for number, score in enumerate(scores)]
            return attempts, await count_votes(attempts, grader)
        finally:
            grader.close()

    attempts, votes = asyncio.run(asyncio.wait_for(scenario(), 100))
    assert [each.given for each in attempts] == ["0.5", r"\frac{2}{3}", r"\frac{4}{6}", "2/3", r"\dfrac12", None, "7"]
    assert votes.classes == (0, 1, 1, 1, 0, None, 2)
    assert (votes.right, votes.wrong, votes.silent, votes.undecided) == (2, [3, 1], 1, 0)


class Asked:
    """Finds answers equal that begin alike; `?` it cannot decide."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    async def same(self, one: str, other: str) -> bool | None:
        self.pairs.append((one, other))
        return None if "?" in one + other else one[0] == other[0]


def test_a_class_is_known_by_its_first_answer_and_what_is_undecided_is_counted() -> None:
    answers = [("a1", 0.0), ("b1", 0.0), ("a2", 0.0), ("c1", 1.0), ("a1", 0.0), ("?", 0.0), (None, 0.0), ("c2", 0.0)]
    grader = Asked()
    votes = asyncio.run(count_votes([attempt(n, given, reward) for n, (given, reward) in enumerate(answers)], grader))
    assert votes == Votes((1, 2, 1, 0, 1, 3, None, 4), undecided=3)
    assert grader.pairs == [
        ("a1", "b1"),
        ("a1", "a2"),
        ("a1", "?"),
        ("b1", "?"),
        ("a1", "c2"),
        ("b1", "c2"),
        ("?", "c2"),
    ], "equal texts, and right answers, are not asked about"


def test_right_is_what_the_answer_is_worth_and_not_the_terms_beside_it() -> None:
    """A combined reward: right but too long, and wrong but well formed."""
    long, formed = attempt(0, "4", 0.5), attempt(1, "5", 1.1)
    long.accuracy, formed.accuracy = 1.0, 0.0
    votes = asyncio.run(count_votes([long, formed], Asked()))
    assert votes.classes == (0, 1)
    made = Problem(TrajectoryGroup(PROMPT, [long, formed], id=GroupId(0, 0)), votes)
    assert (made.accuracy, made.estimates()["pass_at_2"]) == (0.5, 1.0)
    assert [each["accuracy"] for each in made.as_json()["attempts"]] == [1.0, 0.0]
