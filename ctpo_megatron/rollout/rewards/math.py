r"""Rewards that can be verified: the model's last \boxed{} against the known answer."""

from __future__ import annotations

import json
import re
import sys
from decimal import Decimal, InvalidOperation

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.protocols import Outcome, Score
from ctpo_megatron.rollout.rewards.pool import Pool
from ctpo_megatron.rollout.rewards.process import Lost
from ctpo_megatron.types import Prompt

JUDGE = (sys.executable, "-m", "ctpo_megatron.rollout.judge")
START_TIMEOUT_S = 120.0
MAX_ANSWER_CHARS = 1000  # a longer one is nothing that a known answer could equal
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?")
_LOOSE_SPACE = re.compile(r" (?=[-+*/=<>^{}()\[\]])|(?<=[-+*/=<>^{}()\[\]]) ")


class MathReward:
    """1.0 where the last box equals the prompt's answer, else 0.0. Plain pairs are decided here, all others by `rollout.judge`.

    A comparison that takes longer than `timeout_s`, or brings its process down, is undecided: its reward is 0. Close it to end
    its processes.
    """

    def __init__(self, config: MathRewardConfig, *, judges: int = 2) -> None:
        self._timeout_s = config.timeout_s
        what, times = "the process that compares answers", {"start_timeout_s": START_TIMEOUT_S, "timeout_s": config.timeout_s}
        self._judges = Pool(JUDGE, what, count=judges, **times)

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`."""
        given = last_box(outcome.text)
        if given is None or len(given) > MAX_ANSWER_CHARS:
            return Score(0.0)
        answer = last_box(prompt.answer) or prompt.answer
        verdict = quick_verdict(answer, given)
        if verdict is None:
            try:
                verdict = await self._ask(answer, given)
            except Lost as lost:
                return Score(0.0, undecided=True, given=given, why=f"comparing it with the known answer: {lost}")
        return Score(float(verdict), given=given)

    async def same(self, one: str, other: str) -> bool | None:
        """Returns whether two answers, without their boxes, are equal; None where that is undecided."""
        verdict = quick_verdict(one, other)
        if verdict is not None:
            return verdict
        try:
            return await self._ask(one, other)
        except Lost:
            return None

    def close(self) -> None:
        """End the judges' processes."""
        self._judges.close()

    async def _ask(self, answer: str, given: str) -> bool:
        request = json.dumps({"answer": answer, "given": given, "timeout_s": self._timeout_s})
        return bool(json.loads(await self._judges.ask(request.encode())))


def quick_verdict(answer: str, given: str) -> bool | None:
    """Equality where it is plain: equal text, equal numbers, different whole numbers. None where it takes mathematics."""
    left, right = _normalized(answer), _normalized(given)
    if left == right:
        return bool(left)
    if not left or not right:
        return False
    ours, theirs = _decimal(left), _decimal(right)
    if ours is None or theirs is None:
        return None
    if ours == theirs:
        return True
    return False if all(number == number.to_integral_value() for number in (ours, theirs)) else None


def _normalized(text: str) -> str:
    """`text` with single spaces, those around operators and brackets left out, without a pair of math delimiters around it.

    A space may separate the items of a list or the parts of a mixed number, so it is never left out between other characters.
    """
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    if " " in text or not text.isprintable():
        text = _LOOSE_SPACE.sub("", " ".join(text.split()))
    return text


def _decimal(text: str) -> Decimal | None:
    if "," in text and _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None
