"""Code judged by tests in the real sandbox."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ctpo_megatron.config.rewards import CodeReward as CodeRewardConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rollout.protocols import Outcome
from ctpo_megatron.rollout.rewards import opening
from ctpo_megatron.rollout.rewards.opening import check_reward, open_reward
from ctpo_megatron.rollout.sandbox import sandbox_available
from ctpo_megatron.types import Prompt

reason = sandbox_available()
needs_sandbox = pytest.mark.skipif(reason is not None, reason=reason or "")
SUMS = json.dumps({"inputs": ["1 2\n", "3\n4\n"], "outputs": ["3\n", "7\n"]})
PAIRS = json.dumps({"assertions": ["assert pair(1) == (1, '1')", "assert pair(2)[0] > 1"]})


def scores(answer: str, *codes: str, **settings: object) -> list[float]:
    config = CodeRewardConfig.model_validate({"score": "share"} | settings)

    async def run() -> list[float]:
        async with open_reward(config, Path("unused")) as reward:
            texts = [Outcome(f"So:\n```python\n{code}\n```\n") for code in codes]
            return [
                score.reward for score in await asyncio.gather(*(reward.score(Prompt(0, (), answer), each) for each in texts))
            ]

    return asyncio.run(run())


@needs_sandbox
def test_programs_that_read_and_print() -> None:
    assert scores(
        SUMS,
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "print(sum(map(int, open(0).read().split() or [0])))",  # the real standard input holds nothing
        "a, b = map(int, input().split())\nprint(a + b)",  # the second input has its numbers on two lines
        "print(3)",
        "print(3)\nraise SystemExit(1)",
        "if __name__ == '__main__':\n    print(sum(int(w) for l in __import__('sys').stdin for w in l.split()))",
        "print(sum(map(int, sys.stdin.read().split())))",  # what ran before has left no names behind
        "print(1",
    ) == [1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 0.0, 0.0]


@needs_sandbox
def test_functions_that_return() -> None:
    assert scores(
        PAIRS,
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    n: 'int'\ndef pair(n): return (P(n).n, str(n))",
        "def pair(n): return [n, str(n)]",  # a list is no tuple, but has a first element
        "def pair(n):\n    print('noise')\n    return (n, str(n))\nif __name__ == '__main__':\n    raise ValueError",
        "pair = lambda n: object()",
        "def pair(n): raise ValueError",
        "x = 1",
    ) == [1.0, 0.5, 1.0, 0.0, 0.0, 0.0]


@needs_sandbox
def test_code_that_hangs_or_floods_has_not_passed() -> None:
    settings = {"timeout_s": 1.0, "max_tests": 1}
    assert scores(SUMS, "while True: pass", "print(3)\nprint('x' * 10**6)", "x = 'y' * 10**10", **settings) == [0.0, 0.0, 0.0]


def test_without_a_sandbox_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "sandbox_available", lambda: "bubblewrap is not installed.")
    with pytest.raises(ConfigError, match=r"run confined or not at all\. bubblewrap is not installed"):
        check_reward(CodeRewardConfig())
