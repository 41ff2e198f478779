"""What a training run leaves behind: scalars, trajectories, and the numbers of its summary."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ctpo_megatron.config.cluster import LogConfig
from ctpo_megatron.loop.evaluate import Evaluation
from ctpo_megatron.loop.health import health_histograms
from ctpo_megatron.loop.statistics import load_histograms
from ctpo_megatron.record import Recorder, progress
from ctpo_megatron.types import Trajectory, TrajectoryGroup


class RunReport:
    """Gathers every step's numbers; `summary` is what summary.json holds of them."""

    def __init__(self, run_dir: Path, config: LogConfig, recorder: Recorder, accuracies: dict[int, float]) -> None:
        self._run_dir = run_dir
        self._config = config
        self.accuracies = dict(accuracies)  # held-out accuracy by the number of training steps before it
        self._recorder = recorder
        self._seconds: dict[str, float] = defaultdict(float)
        self._rollout_tokens = 0
        self._train_tokens = 0
        self._drift_max = 0.0
        self._steps = 0

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar in a terminal, plain lines elsewhere; call the result with how much is done."""
        return progress(title, total)

    def step(
        self,
        step: int,
        groups: list[TrajectoryGroup],
        metrics: dict[str, float],
        seconds: dict[str, float],
        wall: float,
    ) -> None:
        """Record training step `step` (counted from 1) that took `wall` seconds, `seconds` of them by phase."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        sampled = sum(t.sampled_length for t in trajectories)
        trained = sum(len(t.prompt_ids) + t.response_length for t in trajectories)
        self._steps += 1
        self._rollout_tokens += sampled
        self._train_tokens += trained
        self._drift_max = max(self._drift_max, metrics.get("drift/max", 0.0))
        for phase, value in (seconds | {"total": wall}).items():
            self._seconds[phase] += value
        metrics = metrics | {f"time/{phase}": value for phase, value in seconds.items()}
        metrics["time/step"] = wall
        metrics["perf/rollout_tokens_per_s"] = sampled / max(seconds["rollout"], 1e-9)
        metrics["perf/train_tokens_per_s"] = trained / max(seconds["train"], 1e-9)
        self._recorder.step(step, metrics)
        self._recorder.histogram("reward", [t.reward for t in trajectories], step)
        self._recorder.histogram("response_tokens", [t.response_length for t in trajectories], step)
        for name, (edges, heights) in (health_histograms(metrics) | load_histograms(metrics)).items():
            self._recorder.buckets(name, edges, heights, step)
        for index, trajectory in enumerate(trajectories[: self._config.rollouts_per_step]):
            self._recorder.text(f"rollout/{index}", as_markdown(groups[0], trajectory), step)
        if self._config.save_rollouts:
            self._save("step", step, groups)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Record a held-out evaluation of the policy after `step` training steps."""
        self.accuracies[step] = result.accuracy
        self._recorder.step(step, result.metrics())
        self._seconds["eval"] += result.seconds
        if self._config.save_rollouts:
            self._save("eval", step, result.groups)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Record that the checkpoint after `step` training steps was written."""
        self._recorder.step(step, {"time/checkpoint": seconds})

    def summary(self) -> dict[str, Any]:
        """Means over the run: tokens per second of the phase that makes them, seconds per step by phase, largest drift."""
        steps = max(self._steps, 1)
        return {
            "rollout_tokens_per_s": self._rollout_tokens / max(self._seconds["rollout"], 1e-9),
            "train_tokens_per_s": self._train_tokens / max(self._seconds["train"], 1e-9),
            "step_seconds": {phase: value / steps for phase, value in self._seconds.items() if phase != "eval"},
            "eval_seconds": self._seconds["eval"],
            "mismatch_max": self._drift_max,
        }

    def close(self) -> None:
        """Flush what is not yet on disk."""
        self._recorder.close()

    def _save(self, kind: str, step: int, groups: list[TrajectoryGroup]) -> None:
        path = self._run_dir / "rollouts" / f"{kind}_{step:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            for group in groups:
                for trajectory in group.trajectories:
                    file.write(json.dumps({"answer": group.prompt.answer} | as_row(trajectory)) + "\n")


def as_row(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain numbers and text; what the engine recorded for the trainer alone is left out."""
    row = asdict(replace(trajectory, routed_experts=None, turns=[replace(turn, top_k=None) for turn in trajectory.turns]))
    del row["routed_experts"]
    for turn in row["turns"]:
        del turn["top_k"]
    return row


def as_markdown(group: TrajectoryGroup, trajectory: Trajectory) -> str:
    """A trajectory for a person, in TensorBoard's text panel."""
    question = group.prompt.messages[-1]["content"]
    return (
        f"**reward {trajectory.reward:g}**, answer `{group.prompt.answer}`, {trajectory.status}, "
        f"{trajectory.tool_calls} tool calls\n\n    {_indent(question)}\n\n---\n\n    {_indent(trajectory.text)}\n"
    )


def _indent(text: str) -> str:
    return text.replace("\n", "\n    ")
