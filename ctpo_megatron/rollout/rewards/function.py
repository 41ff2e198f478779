"""A user's function as a reward, in processes of its own with limits of time and memory.

Whatever goes wrong in it leaves the answer undecided, and worth 0: it was looked at, and one that makes its judge hang or raise
may gain nothing by it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from ctpo_megatron.config.rewards import FunctionReward as FunctionRewardConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.protocols import Outcome, Score
from ctpo_megatron.rollout.rewards.pool import Pool
from ctpo_megatron.rollout.rewards.process import READY, Late, Lost, not_started
from ctpo_megatron.rollout.rewards.same_text import SameText
from ctpo_megatron.types import Prompt

GRACE_S = 2.0  # for a function that waits to be ended in its process, which then need not be started again
MAX_NAMES = 50  # of numbers, in a run


class FunctionReward(SameText):
    """What the function says. Close it to end its processes; each is started when it is first needed, and after it was ended."""

    def __init__(self, config: FunctionRewardConfig) -> None:
        self._config = config
        limit_s = config.timeout_s + GRACE_S
        times = {"start_timeout_s": config.start_timeout_s, "timeout_s": limit_s}
        self._processes = Pool(_command(config), _what(config), count=config.processes, **times)
        self._names: set[str] = set()

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`. Raises RolloutError where no process starts."""
        given = last_box(outcome.text)
        request = json.dumps(sample_of(prompt, outcome), default=str).encode()
        try:
            found = json.loads(await self._processes.ask(request))
        except Late:
            found = {"why": f"no end within {self._config.timeout_s:g} s"}
        except Lost as lost:
            found = {"why": str(lost)}
        self._names |= set(found.get("terms", {}))
        if len(self._names) > MAX_NAMES:
            found = {
                "why": f"its numbers have had more than {MAX_NAMES} names; each is recorded, so names may not depend on answers"
            }
        if "why" in found:
            return Score(0.0, undecided=True, given=given, why=f"{self._config.function}: {found['why']}")
        said = given if found["given"] is None else found["given"]
        return Score(found["reward"], given=said, terms=found["terms"], accuracy=found.get("accuracy"))

    def close(self) -> None:
        """End the processes."""
        self._processes.close()


def sample_of(prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    """Returns what the function is given: plain data."""
    return {
        "messages": list(prompt.messages),
        "answer": prompt.answer,
        "text": outcome.text,
        "turns": [{"role": role, "text": text} for role, text in outcome.turns],
        "status": str(outcome.status),
        "response_tokens": outcome.response_tokens,
        "tool_calls": outcome.tool_calls,
        "tool_errors": outcome.tool_errors,
    }


def check_function(config: FunctionRewardConfig) -> None:
    """Raise ConfigError where a process cannot load the function."""
    command = _command(config)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=config.start_timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{_what(config)} did not start within {config.start_timeout_s:g} s") from None
    if done.stdout != READY:
        said = done.stdout or done.stderr[-500:] or f"its process ended with code {done.returncode}".encode()
        raise ConfigError(f"{not_started(_what(config), command, said)}. Is its package on PYTHONPATH?")


def _command(config: FunctionRewardConfig) -> list[str]:
    program = "ctpo_megatron.rollout.rewards.function_process"
    return [sys.executable, "-m", program, config.function, f"{config.timeout_s:g}", str(config.memory_mb)]


def _what(config: FunctionRewardConfig) -> str:
    return f"the reward function {config.function}"
