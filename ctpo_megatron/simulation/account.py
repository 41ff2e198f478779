"""Where the time of a simulated run goes: its steady steps, as a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.simulation.numbers import Step
from ctpo_megatron.simulation.run import Simulated

PHASES = ("rollout", "train", "publish")


@dataclass(frozen=True, slots=True)
class Account:
    """Means over the steps `first` to `last`, counted from 1. Seconds are virtual, but for those of the controller."""

    first: int
    last: int
    step_s: float
    phases: dict[str, float]  # seconds of a step by what the trainer did: it waits for rollouts, trains, waits for a publication
    tail_s: float  # of the rollout, after 80 % of a step's groups were in
    servers: dict[str, float]  # shares of the servers' time: decode, prefill, paused, idle
    running: float  # requests that a server decodes at a time, while it does
    server_tokens_s: float  # that one server samples
    trajectories_s: float
    staleness_mean: float  # versions, over tokens
    staleness_max: float
    controller_ms: float  # CPU time of the controller for each trajectory of the whole simulation

    @property
    def steps_per_hour(self) -> float:
        """Returns how many steps an hour has."""
        return 3600 / self.step_s

    @property
    def bubble(self) -> float:
        """Returns the share of a step in which the trainer waits for rollouts."""
        return self.phases.get("rollout", 0.0) / self.step_s

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {**asdict(self), "steps_per_hour": self.steps_per_hour, "bubble": self.bubble}


def steps_to_simulate(config: RunConfig, steady: int) -> tuple[int, int, int]:
    """Returns how many steps to simulate for `steady` ones in the middle, and the first and last of these, from 1.

    The first steps find an empty pipeline, and in the last ones nothing is admitted that could not be trained on any more.
    """
    ahead = StepRules.of(config).ahead + 1
    return steady + 2 * ahead, ahead + 1, ahead + steady


def account(made: Simulated, first: int, last: int) -> Account:
    """Returns the account of the steps `first` to `last` of `made`, counted from 1."""
    steps = made.steps[first - 1 : last]
    before = made.steps[first - 2] if first > 1 else None
    began = before.ended if before is not None else steps[0].ended - steps[0].seconds
    wall = steps[-1].ended - began
    used = {name: _used(steps, before, name) for name in ("decode", "prefill", "paused", "tokens", "requests")}
    shares = {name: used[name] / (wall * made.servers) for name in ("decode", "prefill", "paused")}
    phases = {name: fmean(step.phases.get(name, 0.0) for step in steps) for name in PHASES}
    return Account(
        first=first,
        last=last,
        step_s=wall / len(steps),
        phases=phases,
        tail_s=fmean(step.tail for step in steps),
        servers=shares | {"idle": max(0.0, 1 - sum(shares.values()))},
        running=used["requests"] / max(used["decode"], 1e-9),
        server_tokens_s=used["tokens"] / (wall * made.servers),
        trajectories_s=sum(step.trajectories for step in steps) / wall,
        staleness_mean=fmean(step.metrics["rollout/staleness_mean"] for step in steps),
        staleness_max=max(step.metrics["rollout/staleness_max"] for step in steps),
        controller_ms=1e3 * made.controller_s / max(made.trajectories, 1),
    )


def _used(steps: Sequence[Step], before: Step | None, name: str) -> float:
    since = 0.0 if before is None else getattr(before.servers, name)
    return float(getattr(steps[-1].servers, name)) - since
