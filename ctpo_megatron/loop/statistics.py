"""Numbers of a step that come from its trajectories and from the trainer, under the names the record uses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.loop.health import health_metrics
from ctpo_megatron.record.values import Mean, Value
from ctpo_megatron.types import Status, Trajectory, TrajectoryGroup


def rollout_metrics(groups: list[TrajectoryGroup], version: int) -> dict[str, float]:
    """Returns rewards, lengths, tool use and staleness of a rollout batch."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    rewards = [t.reward for t in trajectories]
    count = len(trajectories)
    ages = [version - v for t in trajectories for turn in t.all_turns if turn.role == "assistant" for v in turn.versions]
    calls = sum(t.tool_calls for t in trajectories)
    return (
        _replayed(trajectories)
        | _terms(trajectories)
        | {
            "reward/mean": sum(rewards) / count,
            "reward/std": statistics.pstdev(rewards),
            "reward/undecided": sum(t.undecided for t in trajectories),
            "reward/mixed_groups": sum(len({t.reward for t in g.trajectories}) > 1 for g in groups) / len(groups),
            "rollout/response_tokens": sum(t.response_length for t in trajectories) / count,
            "rollout/response_tokens_max": max(t.response_length for t in trajectories),
            "rollout/sampled_tokens": sum(t.sampled_length for t in trajectories) / count,
            "rollout/prompt_tokens": sum(len(t.prompt_ids) for t in trajectories) / count,
            "rollout/turns": sum(sum(turn.role == "assistant" for turn in t.all_turns) for t in trajectories) / count,
            "rollout/branches": sum(len(t.branches) for t in trajectories) / count,
            "rollout/truncated": sum(t.status is not Status.FINISHED for t in trajectories) / count,
            "rollout/deadline": sum(t.status is Status.DEADLINE for t in trajectories) / count,
            "rollout/unanswered": sum(t.status is Status.UNANSWERED for t in trajectories) / count,
            "rollout/staleness_mean": sum(ages) / max(len(ages), 1),
            "rollout/staleness_max": max(ages, default=0),
            "tool/rate": sum(t.tool_calls > 0 for t in trajectories) / count,
            "tool/calls": calls / count,
            "tool/error_rate": sum(t.tool_errors for t in trajectories) / max(calls, 1),
        }
    )


def spared_share(batches: list[TrainBatch], groups: list[TrajectoryGroup]) -> dict[str, float]:
    """Returns the share of a step's samples that had no pass (`data.sparing`)."""
    samples = sum(1 + len(each.branches) for group in groups for each in group.trajectories)
    return {"train/spared": sum(len(batch.spared) for batch in batches) / max(samples, 1)}


def _terms(trajectories: list[Trajectory]) -> dict[str, float]:
    """Returns the mean of each number that came with rewards, over the trajectories that have it."""
    names = {name for each in trajectories for name in each.terms}
    return {
        f"reward/term/{name}": statistics.fmean(t.terms[name] for t in trajectories if name in t.terms) for name in sorted(names)
    }


def _replayed(trajectories: list[Trajectory]) -> dict[str, float]:
    """Returns the share of the tokens that the trainer routes as the engine did; nothing where no routing is recorded."""
    known = [t.routed_experts[:, 0, 0] >= 0 for t in trajectories if t.routed_experts is not None]
    return {"routing/replayed": float(np.concatenate(known).mean())} if known else {}


def load_histograms(metrics: dict[str, float]) -> dict[str, tuple[list[float], list[float]]]:
    """How even the load of experts is, layer by layer, as histograms: name to borders [n+1] and heights [n] over layers."""
    histograms = {}
    for name in ("moe/load_max_over_mean", "moe/load_entropy"):
        layers = [int(key.rpartition("_")[2]) for key in metrics if key.startswith(f"{name}/layer_")]
        if layers:
            heights = [metrics.get(f"{name}/layer_{n}", 0.0) for n in range(max(layers) + 1)]
            histograms[name] = ([float(n) for n in range(max(layers) + 2)], heights)
    return histograms


def expert_load(stats: Mapping[str, Value]) -> NDArray[np.float64] | None:
    """Returns the tokens of each expert over its layer's mean, [layers, experts]; None where there are no experts."""
    layers = sorted(int(name.rpartition("_")[2]) for name in stats if name.startswith("moe/load/layer_"))
    return np.stack([np.asarray(stats[f"moe/load/layer_{n}"].result()) for n in layers]) if layers else None


def train_metrics(stats: Mapping[str, Value]) -> dict[str, float]:
    """Values of the optimizer steps under the names the record uses.

    What has no room of its own in its name is the training step's: `train/...`. Vectors are shown as the health panel says. A
    step without a token of the newest version has no drift, where 0 would say that trainer and engine agree.
    """
    drift = stats.get("drift/mean")
    unseen = {"drift/mean", "drift/max"} if isinstance(drift, Mean) and not drift.weight else set()
    scalars = {name: value.result() for name, value in stats.items() if name not in unseen}
    named = {name if "/" in name else f"train/{name}": value for name, value in scalars.items() if isinstance(value, float)}
    return named | health_metrics(stats)
