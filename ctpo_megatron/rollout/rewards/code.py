"""Code that a model wrote, judged by tests in the sandbox."""

from __future__ import annotations

import secrets

from ctpo_megatron.config.rewards import CodeReward as CodeRewardConfig
from ctpo_megatron.rollout.protocols import Outcome, Score, ToolRunner
from ctpo_megatron.rollout.rewards.code_tests import last_code, read_tests
from ctpo_megatron.rollout.rewards.same_text import SameText
from ctpo_megatron.types import Prompt


class CodeReward(SameText):
    """What `sandbox` finds of the last block of code by the tests of the known answer.

    Code that fails, hangs or prints too much has not passed its test. A sandbox that is broken raises, as it does for the tool.
    """

    def __init__(self, config: CodeRewardConfig, sandbox: ToolRunner) -> None:
        self._config, self._sandbox = config, sandbox

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`."""
        code = last_code(outcome.text)
        if code is None:
            return Score(0.0)
        tests = read_tests(prompt.answer, f"prompt {prompt.index}")[: self._config.max_tests]
        passed = 0
        for number, test in enumerate(tests):
            if self._config.score == "all" and passed < number:
                return Score(0.0, given=code)
            mark = secrets.token_hex(8)
            result = await self._sandbox.run(test.program(code, mark))
            passed += result.ok and test.passed(result.output, mark)
        return Score(float(passed == len(tests)) if self._config.score == "all" else passed / len(tests), given=code)
