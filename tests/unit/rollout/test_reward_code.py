"""Tests of code as known answers, without running anything."""

from __future__ import annotations

import asyncio
import json

import pytest

from ctpo_megatron.config.rewards import CodeReward as CodeRewardConfig
from ctpo_megatron.config.rewards import MathReward
from ctpo_megatron.errors import DataError
from ctpo_megatron.rollout.protocols import Outcome, ToolResult
from ctpo_megatron.rollout.rewards.code import CodeReward
from ctpo_megatron.rollout.rewards.code_tests import Printing, Returning, last_code, read_tests
from ctpo_megatron.rollout.rewards.opening import check_answers
from ctpo_megatron.types import Prompt


def test_both_forms_of_tests_are_read() -> None:
    assert read_tests('{"inputs": ["1\\n"], "outputs": ["2"]}', "") == [Printing("1\n", "2")]
    given = ["assert f(1) == (1, {'a': 2})", "assert [3] == f(2)", "assert f(3) > 2, 'more'", "assert f(1) == g(2)"]
    assert read_tests(json.dumps({"assertions": given}), "") == [
        Returning("f(1)", (1, {"a": 2})),
        Returning("f(2)", [3]),
        Returning("bool(f(3) > 2)", True),
        Returning("bool(f(1) == g(2))", True),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "42x",
        "[1]",
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": [], "outputs": []}',
        '{"inputs": [1], "outputs": ["1"]}',
        '{"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}',
        '{"assertions": []}',
        '{"assertions": ["f(1) == 2"]}',
        '{"assertions": ["assert f(1) =="]}',
        '{"assertions": ["assert f(1); f(2)"]}',
    ],
)
def test_other_answers_are_refused_with_their_row_before_a_run(answer: str) -> None:
    prompts = [Prompt(0, (), '{"assertions": ["assert f(1) == 2"]}'), Prompt(7, (), answer)]
    with pytest.raises(DataError, match=r"problems\.jsonl, row 7: "):
        check_answers(CodeRewardConfig(), prompts, "problems.jsonl")
    check_answers(MathReward(), prompts, "problems.jsonl")  # which wants nothing of the kind


def test_what_is_expected_stays_out_of_the_program() -> None:
    printing, returning = (
        read_tests('{"inputs": ["1"], "outputs": ["secret"]}', ""),
        read_tests('{"assertions": ["assert f() == 9137"]}', ""),
    )
    for test in (*printing, *returning):
        assert "secret" not in test.program("code", "mark")
        assert "9137" not in test.program("code", "mark")


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        ('m{"tuple": [1, {"list": ["a"]}]}', True),
        ('noise m 1\nm{"tuple": [1, {"list": ["a"]}]}', True),
        ('m{"list": [1, {"list": ["a"]}]}', False),
        ('m{"tuple": [1, {"other": "<class>"}]}', False),
        ("m" + "[" * 100_000, False),
        ('m{"tuple": 5}', False),
        ('m{"dict": [[{"list": []}, 1]]}', False),
        ("(1, ['a'])", False),
        ("", False),
    ],
)
def test_a_value_counts_as_python_compares_it(said: str, passed: bool) -> None:
    assert Returning("f()", (1, ["a"])).passed(said, "m") is passed


def test_output_counts_but_for_white_space() -> None:
    assert Printing("", "1 2\n3\n").passed("1  2 \n3", "")
    assert not Printing("", "1 2\n3\n").passed("12\n3", "")


def test_the_last_closed_block_is_the_code() -> None:
    assert last_code("```python\na\n```\nand\n```py\nb\nc\n```\n") == "b\nc\n"
    assert last_code("```\na\n```") == "a\n"
    assert last_code("```python\na") is None
    assert last_code("```bash\nls\n```") is None


class Sandbox:
    """Says what each run comes to."""

    def __init__(self, *results: ToolResult) -> None:
        self.results, self.programs = list(results), list[str]()

    async def run(self, code: str) -> ToolResult:
        self.programs.append(code)
        return self.results[len(self.programs) - 1]


GOOD, BAD, FAILED = ToolResult("2", True, 0.0), ToolResult("3", True, 0.0), ToolResult("2", False, 0.0)


@pytest.mark.parametrize(
    ("score", "limit", "results", "worth", "runs"),
    [
        ("all", None, (GOOD, GOOD, GOOD), 1.0, 3),
        ("all", None, (GOOD, BAD, GOOD), 0.0, 2),
        ("all", None, (GOOD, GOOD, FAILED), 0.0, 3),
        ("share", None, (BAD, GOOD, FAILED), 1 / 3, 3),
        ("all", 1, (GOOD,), 1.0, 1),
    ],
)
def test_all_tests_or_a_share_of_them(
    score: str, limit: int | None, results: tuple[ToolResult, ...], worth: float, runs: int
) -> None:
    sandbox = Sandbox(*results)
    reward = CodeReward(CodeRewardConfig.model_validate({"score": score, "max_tests": limit}), sandbox)
    prompt = Prompt(0, (), '{"inputs": ["1", "1", "1"], "outputs": ["2", "2", "2"]}')
    judged = asyncio.run(reward.score(prompt, Outcome("```python\nprint(2)\n```")))
    assert (judged.reward, judged.given, len(sandbox.programs)) == (pytest.approx(worth), "print(2)\n", runs)
    assert asyncio.run(reward.score(prompt, Outcome("print(2)"))).reward == 0.0
    assert len(sandbox.programs) == runs
