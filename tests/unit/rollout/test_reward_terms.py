"""The cheap terms of a reward, their sum, and the settings that verdicts depend on."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from ctpo_megatron.config.rewards import AnyReward, FormatTerm, LengthTerm, ToolUseTerm, verdict_settings
from ctpo_megatron.jobs.journal import reward_recipe
from ctpo_megatron.rollout.protocols import Outcome, Reward, Score
from ctpo_megatron.rollout.rewards.code_tests import read_tests
from ctpo_megatron.rollout.rewards.combination import Combination, Term
from ctpo_megatron.rollout.rewards.opening import open_reward
from ctpo_megatron.rollout.rewards.same_text import SameText
from ctpo_megatron.rollout.rewards.terms import Format, Length, ToolUse
from ctpo_megatron.types import Prompt

PROMPT = Prompt(0, ({"role": "user", "content": "2 + 2?"},), "4")


def scored(reward: Reward, outcome: Outcome) -> Score:
    return asyncio.run(reward.score(PROMPT, outcome))


def read(**settings: object) -> AnyReward:
    return TypeAdapter(AnyReward).validate_python(settings)


@pytest.mark.parametrize(
    ("text", "worth"), [("<think>\nso\n</think> 4", 1.0), ("4", 0.0), ("<think></think>", 1.0), ("x <think>a</think>", 0.0)]
)
def test_a_format_is_found_over_line_ends(text: str, worth: float) -> None:
    assert scored(Format(FormatTerm(pattern=r"\A<think>.*</think>")), Outcome(text)).reward == worth


def test_a_search_without_end_is_undecided_and_others_go_on_meanwhile() -> None:
    async def both() -> tuple[Score, int]:
        term = Format(FormatTerm(pattern=r"\A(?:a|a|aa)*c?\Z", timeout_s=0.5))
        hopeless, turns = asyncio.ensure_future(term.score(PROMPT, Outcome("a" * 60 + "b"))), 0
        while not hopeless.done():
            turns += 1
            await asyncio.sleep(0.01)
        return await hopeless, turns

    score, turns = asyncio.run(both())
    assert (score.reward, score.undecided, score.why) == (0.0, True, "the search for the pattern: no end within 0.5 s")
    assert turns > 4  # 2 or 3 where the search keeps all other threads out


@pytest.mark.parametrize(("tokens", "worth"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (170, -1.0)])
def test_length_costs_from_the_buffer_on(tokens: int, worth: float) -> None:
    term = Length(LengthTerm(max_tokens=100, buffer=20))
    assert scored(term, Outcome("", response_tokens=tokens)).reward == pytest.approx(worth)


@pytest.mark.parametrize(("calls", "errors", "worth"), [(0, 0, 0.0), (1, 0, 1.0), (2, 1, 0.75), (3, 3, 0.5), (4, 0, 0.0)])
def test_tool_use_wants_so_many_calls_that_work(calls: int, errors: int, worth: float) -> None:
    term = ToolUse(ToolUseTerm(max_calls=3, failed=0.5))
    assert scored(term, Outcome("", tool_calls=calls, tool_errors=errors)).reward == worth


@dataclass
class Fixed(SameText):
    """Gives what it is made with."""

    gives: Score
    asked: int = 0

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        self.asked += 1
        return self.gives


def test_a_combination_is_the_weighted_sum_and_evaluations_count_the_answer() -> None:
    answer = Fixed(Score(0.5, given="4", terms={"judge_tokens": 30.0}))
    style = Term("style", 0.2, Fixed(Score(1.0, given="no")), judges_answers=True)
    terms = [Term("length", 2.0, Fixed(Score(-0.25)), False), Term("answer", 1.0, answer, True), style]
    score = scored(Combination(terms, answer), Outcome("x"))
    assert score.reward == pytest.approx(2.0 * -0.25 + 0.5 + 0.2)
    assert score.terms == {"length": -0.25, "answer": 0.5, "answer_judge_tokens": 30.0, "style": 1.0}
    assert (score.given, score.accuracy, score.undecided) == ("4", 0.5, False)


def test_a_combination_without_a_verdict_on_one_part_has_none() -> None:
    after = Fixed(Score(1.0))
    terms = [Term("format", 1.0, Fixed(Score(1.0)), False), Term("answer", 1.0, Fixed(Score(0.0, True, why="why")), True)]
    score = scored(Combination([*terms, Term("style", 1.0, after, True)], after), Outcome("x"))
    assert (score.reward, score.undecided, score.why, score.terms) == (0.0, True, "answer: why", {"format": 1.0})
    assert after.asked == 0  # what costs money is not asked about what is undecided already


def test_a_configured_combination_of_mathematics_and_form(tmp_path: Path) -> None:
    terms = [
        {"name": "answer", "reward": {"type": "math"}},
        {"name": "format", "weight": 0.5, "reward": {"type": "format", "pattern": "^so"}},
        {"name": "length", "reward": {"type": "length", "max_tokens": 10, "buffer": 5}},
    ]

    async def score() -> tuple[Score, bool | None]:
        async with open_reward(read(type="combination", terms=terms), tmp_path) as reward:
            judged = await reward.score(PROMPT, Outcome(r"so \boxed{4}", response_tokens=6))
            return judged, await reward.same("4", "4.0")

    judged, same = asyncio.run(score())
    assert judged.reward == pytest.approx(1 + 0.5 - 0.2)
    assert (judged.given, judged.accuracy, same) == ("4", 1.0, True)


JUDGE = {"type": "judge", "url": "http://host/v1", "model": "m", "budget_calls": None}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "combination", "terms": []}, "one term at least"),
        ({"type": "combination", "terms": [{"name": "a", "reward": {"type": "math"}}] * 2}, "a name of its own"),
        ({"type": "format", "pattern": "("}, "union_tag_invalid"),  # a term, and no reward
        ({"type": "judge", "url": "http://host/v1", "model": "m"}, "budget_calls"),
        ({**JUDGE, "url": "http://host/v1/chat/completions"}, "without /chat/completions"),
        ({**JUDGE, "url": "http://me:secret@host/v1"}, "without a key"),
        ({**JUDGE, "prompt": "$question"}, r"\$response is missing"),
        ({**JUDGE, "prompt": "$response $who"}, "its places are"),
        ({**JUDGE, "prompt": "$response for $5"}, "a dollar is written"),
        ({**JUDGE, "extra": {"stream": True}}, "may not be among them"),
        ({**JUDGE, "lowest": 1.0}, "is not below"),
        ({"type": "function", "function": "reward"}, "function"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        read(**settings)


def test_a_run_keeps_verdicts_as_long_as_what_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"url": "http://other/v1", "timeout_s": 1.0, "retries": 0, "concurrency": 1, "budget_calls": 9, "beyond": "zero"}
    assert verdict_settings(read(**JUDGE)) == verdict_settings(read(**JUDGE | same))
    for key, value in {"model": "n", "prompt": "$response", "temperature": 1.0, "highest": 5.0}.items():
        assert verdict_settings(read(**JUDGE)) != verdict_settings(read(**JUDGE | {key: value}))

    def combined(weight: float, **of_judge: object) -> AnyReward:
        return read(type="combination", terms=[{"name": "a", "weight": weight, "reward": JUDGE | of_judge}])

    assert reward_recipe(combined(1.0)) == reward_recipe(combined(1.0, retries=0))
    assert reward_recipe(combined(1.0)) != reward_recipe(combined(0.5))
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "mine_of_recipes"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('nothing of a user is imported in the driver')")
    (package / "rewards.py").write_text("def length(sample): return 1")
    function = read(type="function", function="mine_of_recipes.rewards:length")
    before = reward_recipe(function)
    assert before == reward_recipe(read(type="function", function="mine_of_recipes.rewards:length", processes=9))
    (package / "rewards.py").write_text("def length(sample): return 2")
    assert reward_recipe(function) != before


def test_the_examples_in_the_documentation_are_what_is_read() -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    settings = [yaml.safe_load(block)["rollout"]["reward"] for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert [read(**each).type for each in settings] == ["combination", "judge", "function"]
    (tests,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert [len(read_tests(line, "")) for line in tests.splitlines()] == [2, 2]
