"""Whether known answers are accepted by their own grader: each is judged as in a run, put in a box as a model would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.record.progress import reading_progress
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.grading.numerals import read_numeral
from ctpo_megatron.rollout.grading.quantities import read_quantity
from ctpo_megatron.rollout.grading.structure import Value, read_answer
from ctpo_megatron.rollout.protocols import Outcome
from ctpo_megatron.rollout.rewards.math import MAX_ANSWER_CHARS, MathReward
from ctpo_megatron.types import Prompt

JUDGES = 2


@dataclass(frozen=True, slots=True)
class Rejected:
    """A known answer for which nobody could be rewarded."""

    answer: str
    rows: tuple[int, ...]
    why: str


@dataclass(frozen=True, slots=True)
class GoldAnswers:
    """The known answers of a file, each different one judged once."""

    different: int
    numbers: int  # of the different ones: those that are numbers, with or without a unit
    others: tuple[str, ...]  # all that are not
    rejected: tuple[Rejected, ...]


def judge_answers(prompts: Sequence[Prompt], config: MathRewardConfig) -> GoldAnswers:
    """Returns what the reward of a run says of each known answer in a box. Judges are processes with the run's limit on time.

    Raises RolloutError where they cannot be started.
    """
    rows: dict[str, list[int]] = {}
    for prompt in prompts:
        rows.setdefault(prompt.answer, []).append(prompt.index)
    with reading_progress("judging known answers") as show:
        reasons = asyncio.run(_reasons(list(rows), config, show))
    rejected = tuple(Rejected(answer, tuple(rows[answer]), why) for answer, why in reasons.items())
    others = tuple(answer for answer in rows if not _is_number(answer))
    return GoldAnswers(len(rows), len(rows) - len(others), others, rejected)


async def _reasons(answers: Sequence[str], config: MathRewardConfig, show: Callable[[int, int], None]) -> dict[str, str]:
    """Why answers are rejected, for those that are, in order."""
    reward = MathReward(config, judges=JUDGES)
    reasons: dict[str, str] = {}
    waiting = iter(enumerate(answers))

    async def work() -> None:
        for done, answer in waiting:
            why = await _reason(answer, reward, config)
            if why is not None:
                reasons[answer] = why
            show(done, len(answers))

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(JUDGES):
                tasks.create_task(work())
    finally:
        reward.close()
    return {answer: reasons[answer] for answer in answers if answer in reasons}


async def _reason(answer: str, reward: MathReward, config: MathRewardConfig) -> str | None:
    text = f"\\boxed{{{answer}}}"
    score = await reward.score(Prompt(0, (), answer), Outcome(text))
    if score.reward > 0:
        return None
    if score.undecided:
        return f"the grader comes to no end within rollout.reward.timeout_s = {config.timeout_s:g}"
    given = last_box(text)
    if given is None:
        return "its braces do not balance, so no box can hold it"
    if len(given) > MAX_ANSWER_CHARS:
        return f"it has {len(given):,} characters; an answer of more than {MAX_ANSWER_CHARS:,} is never compared"
    return "the grader does not find it equal to itself"


def _is_number(answer: str) -> bool:
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    try:
        found = read_answer(last_box(answer) or answer)
        return isinstance(found, Value) and read_numeral(read_quantity(found.text).amount) is not None
    except RecursionError:
        return False
