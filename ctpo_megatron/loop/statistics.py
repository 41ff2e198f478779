"""Numbers of a step that come from its trajectories and from the trainer, under the names the record uses."""

from __future__ import annotations

import statistics

import numpy as np

from ctpo_megatron.loop.health import health_metrics
from ctpo_megatron.types import Status, Trajectory, TrajectoryGroup


def rollout_metrics(groups: list[TrajectoryGroup], version: int) -> dict[str, float]:
    """Rewards, lengths, tool use and staleness of a rollout batch."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    rewards = [t.reward for t in trajectories]
    count = len(trajectories)
    ages = [version - v for t in trajectories for turn in t.turns if turn.role == "assistant" for v in turn.versions]
    calls = sum(t.tool_calls for t in trajectories)
    return _replayed(trajectories) | {
        "reward/mean": sum(rewards) / count,
        "reward/std": statistics.pstdev(rewards),
        "reward/mixed_groups": sum(len({t.reward for t in g.trajectories}) > 1 for g in groups) / len(groups),
        "rollout/response_tokens": sum(t.response_length for t in trajectories) / count,
        "rollout/response_tokens_max": max(t.response_length for t in trajectories),
        "rollout/sampled_tokens": sum(t.sampled_length for t in trajectories) / count,
        "rollout/prompt_tokens": sum(len(t.prompt_ids) for t in trajectories) / count,
        "rollout/turns": sum(sum(turn.role == "assistant" for turn in t.turns) for t in trajectories) / count,
        "rollout/truncated": sum(t.status is not Status.FINISHED for t in trajectories) / count,
        "rollout/staleness_mean": sum(ages) / max(len(ages), 1),
        "rollout/staleness_max": max(ages, default=0),
        "tool/rate": sum(t.tool_calls > 0 for t in trajectories) / count,
        "tool/calls": calls / count,
        "tool/error_rate": sum(t.tool_errors for t in trajectories) / max(calls, 1),
    }


def _replayed(trajectories: list[Trajectory]) -> dict[str, float]:
    """Share of the tokens that the trainer routes as the engine did; nothing where no routing is recorded."""
    known = [t.experts[:, 0, 0] >= 0 for t in trajectories if t.experts is not None]
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


def train_metrics(stats: dict[str, float]) -> dict[str, float]:
    """Reduced statistics of the optimizer steps as readable means. See `algorithms.statistics.token_stats` for the raw keys."""
    tokens = max(stats.get("sum/tokens", 0.0), 1.0)
    drift_tokens = max(stats.get("sum/drift_tokens", 0.0), 1.0)
    out: dict[str, float] = {}
    for key, value in stats.items():
        kind, _, name = key.partition("/")
        if kind in ("moe", "routing"):
            out[key] = value
            continue
        if name.startswith(("drift_tokens", "health/")):
            continue
        if name.startswith("drift_bin_"):
            bin_tokens = stats[f"sum/drift_tokens_bin_{name.removeprefix('drift_bin_')}"]
            if bin_tokens:
                out[f"drift/from_token_{2 ** int(name.removeprefix('drift_bin_'))}"] = value / bin_tokens
        elif name == "drift":
            out["drift/mean" if kind == "sum" else f"drift/{kind}"] = value / drift_tokens if kind == "sum" else value
        elif name == "tokens":
            out["train/tokens"] = value
        elif kind == "sum":
            out[f"train/{name}"] = value / tokens
        elif name:
            out[f"train/{name}_{kind}"] = value
        else:
            out[f"train/{key}"] = value
    return out | health_metrics(stats)
