"""The reward that a configuration asks for: checked before anything starts, and opened for as long as answers are judged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from ctpo_megatron.config.rewards import (
    CodeReward,
    CombinationReward,
    FormatTerm,
    FunctionReward,
    JudgeReward,
    LengthTerm,
    MathReward,
    RewardSection,
    ToolUseTerm,
    parts,
)
from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.record.files import Through, at_once
from ctpo_megatron.rollout.protocols import Grader, Reward, Verifier
from ctpo_megatron.rollout.rewards import code, function, judge_model, math, terms
from ctpo_megatron.rollout.rewards.chat_server import read_key
from ctpo_megatron.rollout.rewards.code_tests import read_tests
from ctpo_megatron.rollout.rewards.combination import Combination, Term
from ctpo_megatron.rollout.rewards.same_text import SameText
from ctpo_megatron.rollout.sandbox import BubblewrapPython, sandbox_available
from ctpo_megatron.rollout.sandbox.escape import require_confinement
from ctpo_megatron.types import Prompt

DIRECTORY = "judge"  # of a run's directory, for what judges say


def check_reward(config: RewardSection) -> None:
    """Raise ConfigError where the reward cannot work here: no sandbox, no key, no function."""
    for _, part in parts(config):
        match part:
            case CodeReward():
                if (reason := sandbox_available()) is not None:
                    raise ConfigError(
                        f"rollout.reward: code cannot be judged here, as it is run confined or not at all. {reason}"
                    )
                require_confinement(_confined(part), "rollout.reward")
            case JudgeReward():
                read_key(part.key_file)
            case FunctionReward():
                function.check_function(part)


def check_answers(config: RewardSection, prompts: Iterable[Prompt], place: str) -> None:
    """Raise DataError for the first known answer in the file `place` that the reward cannot use, with its row."""
    if any(isinstance(part, CodeReward) for _, part in parts(config)):
        for prompt in prompts:
            read_tests(prompt.answer, f"{place}, row {prompt.index}")


@asynccontextmanager
async def open_reward(config: RewardSection, run_dir: Path, through: Through = at_once) -> AsyncIterator[Verifier]:
    """The reward of a run; its processes and connections end on leaving. `through`: how a judge's replies are written.

    Raises ConfigError where something that it needs is missing.
    """
    async with AsyncExitStack() as stack:
        if not isinstance(config, CombinationReward):
            yield await _open_answers("judge", config, run_dir, through, stack)
            return
        found, graders = list[Term](), list[Grader]()
        for term in config.terms:
            reward: Reward | None = _cheap(term.reward)
            if reward is None:
                reward = verifier = await _open_answers(term.name, term.reward, run_dir, through, stack)
                graders.append(verifier)
            found.append(Term(term.name, term.weight, reward, judges_answers=reward in graders))
        yield Combination(found, graders[0] if graders else SameText())


def _confined(config: CodeReward) -> PythonTool:
    """Returns what runs the tests of answers."""
    return PythonTool(timeout_s=config.timeout_s, memory_mb=config.memory_mb, max_output_chars=config.max_output_chars)


def _cheap(config: RewardSection) -> Reward | None:
    """Returns a term that does not look at whether the answer is right, None for another one."""
    match config:
        case FormatTerm():
            return terms.Format(config)
        case LengthTerm():
            return terms.Length(config)
        case ToolUseTerm():
            return terms.ToolUse(config)
    return None


async def _open_answers(name: str, config: RewardSection, run_dir: Path, through: Through, stack: AsyncExitStack) -> Verifier:
    """Returns a reward that judges answers, which `stack` closes."""
    match config:
        case MathReward():
            by_math = math.MathReward(config)
            stack.callback(by_math.close)
            return by_math
        case CodeReward():
            return code.CodeReward(config, BubblewrapPython(_confined(config)))
        case JudgeReward():
            path = run_dir / DIRECTORY / f"{name}.jsonl"
            return await stack.enter_async_context(judge_model.JudgeReward(config, path, through))
        case FunctionReward():
            by_function = function.FunctionReward(config)
            stack.callback(by_function.close)
            return by_function
    raise TypeError(f"{type(config).__name__} judges no answers")
