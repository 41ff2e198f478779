"""What training steps cost, and the sums of it that summary.json holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.types import TrajectoryGroup

SHORTEST_S = 1e-9  # a phase that took no time that can be measured divides by this


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one training step took: `wall` seconds, `seconds` of them by phase, and the tokens that it was spent on."""

    seconds: dict[str, float]
    wall: float
    sampled_tokens: int
    trained_tokens: int  # prompts and tool output included

    @classmethod
    def of(cls, groups: list[TrajectoryGroup], seconds: Mapping[str, float], wall: float) -> StepCost:
        """Returns the cost of a step that trained on `groups`."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        sampled = sum(t.sampled_length for t in trajectories)
        prompts = sum(len(t.prompt_ids) + sum(len(branch.prompt_ids) for branch in t.branches) for t in trajectories)
        trained = prompts + sum(len(turn.token_ids) for t in trajectories for turn in t.all_turns)
        return cls(dict(seconds), wall, sampled, trained)

    def metrics(self) -> dict[str, float]:
        """Returns the seconds, and the tokens per second of the phase that makes them, under the record's names."""
        return {f"time/{phase}": value for phase, value in self.seconds.items()} | {
            "time/step": self.wall,
            "perf/rollout_tokens_per_s": self.sampled_tokens / max(self.seconds["rollout"], SHORTEST_S),
            "perf/train_tokens_per_s": self.trained_tokens / max(self.seconds["train"], SHORTEST_S),
        }


class RunTotals:
    """Sums over the steps of a command, and the largest drift in them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._sampled_tokens = 0
        self._trained_tokens = 0
        self._evaluation_s = 0.0
        self._drift_max = 0.0
        self._steps = 0

    def add_step(self, cost: StepCost, drift_max: float) -> None:
        """Count a training step, and its largest distance of trainer and engine."""
        self._steps += 1
        self._sampled_tokens += cost.sampled_tokens
        self._trained_tokens += cost.trained_tokens
        self._drift_max = max(self._drift_max, drift_max)
        for phase, value in (cost.seconds | {"total": cost.wall}).items():
            self._seconds[phase] += value

    def add_evaluation(self, seconds: float) -> None:
        """Count an evaluation."""
        self._evaluation_s += seconds

    def summary(self) -> dict[str, Any]:
        """Returns tokens per second of the phase that makes them, seconds per step by phase, and the largest drift."""
        steps = max(self._steps, 1)
        return {
            "rollout_tokens_per_s": self._sampled_tokens / max(self._seconds["rollout"], SHORTEST_S),
            "train_tokens_per_s": self._trained_tokens / max(self._seconds["train"], SHORTEST_S),
            "step_seconds": {phase: value / steps for phase, value in self._seconds.items()},
            "eval_seconds": self._evaluation_s,
            "mismatch_max": self._drift_max,
        }
