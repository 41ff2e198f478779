"""Held-out accuracy through the inference servers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from ctpo_megatron.config.rollout import EvalConfig
from ctpo_megatron.loop.protocols import Rollouts
from ctpo_megatron.types import GroupId, Prompt, TrajectoryGroup


@dataclass(frozen=True)
class Evaluation:
    """Means over all samples of all prompts."""

    accuracy: float
    tool_rate: float  # share of trajectories that called a tool
    response_tokens: float
    seconds: float
    groups: list[TrajectoryGroup]

    def metrics(self) -> dict[str, float]:
        """Returns the means under the record's names."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/tool_rate": self.tool_rate,
            "eval/response_tokens": self.response_tokens,
            "time/eval": self.seconds,
        }


async def evaluate(rollouts: Rollouts, prompts: list[Prompt], config: EvalConfig, *, step: int) -> Evaluation:
    """Sample every prompt `config.samples` times and average the rewards. `step`: training steps before it, for the ids."""
    begun = time.monotonic()
    chosen = prompts[: config.prompts]
    groups = await asyncio.gather(
        *(
            rollouts.group(prompt, GroupId(number, evaluation=step), size=config.samples, temperature=config.temperature)
            for number, prompt in enumerate(chosen)
        )
    )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    count = len(trajectories)
    return Evaluation(
        accuracy=sum(t.reward for t in trajectories) / count,
        tool_rate=sum(t.tool_calls > 0 for t in trajectories) / count,
        response_tokens=sum(t.response_length for t in trajectories) / count,
        seconds=time.monotonic() - begun,
        groups=list(groups),
    )
