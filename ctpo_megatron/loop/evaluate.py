"""Held-out accuracy through the inference servers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from ctpo_megatron.config.rollout import EvalConfig
from ctpo_megatron.loop.protocols import Rollouts
from ctpo_megatron.types import Prompt, TrajectoryGroup


@dataclass(frozen=True)
class Evaluation:
    """Means over all samples of all prompts."""

    accuracy: float
    tool_rate: float  # share of trajectories that called a tool
    response_tokens: float
    seconds: float
    groups: list[TrajectoryGroup]

    def metrics(self) -> dict[str, float]:
        """As scalars for the record."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/tool_rate": self.tool_rate,
            "eval/response_tokens": self.response_tokens,
            "time/eval": self.seconds,
        }


async def evaluate(rollouts: Rollouts, prompts: list[Prompt], config: EvalConfig) -> Evaluation:
    """Sample every prompt `config.samples` times and average the rewards."""
    begun = time.monotonic()
    chosen = prompts[: config.prompts]
    groups = await asyncio.gather(
        *(rollouts.group(prompt, size=config.samples, temperature=config.temperature) for prompt in chosen)
    )
    all_of_them = [trajectory for group in groups for trajectory in group.trajectories]
    count = len(all_of_them)
    return Evaluation(
        accuracy=sum(t.reward for t in all_of_them) / count,
        tool_rate=sum(t.tool_calls > 0 for t in all_of_them) / count,
        response_tokens=sum(t.response_length for t in all_of_them) / count,
        seconds=time.monotonic() - begun,
        groups=list(groups),
    )
