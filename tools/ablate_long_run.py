"""One run of the long ablation: a method, a learning rate and a seed, from the seed's cold start to its last reward.

The loss is the project's own (`recipe_loss`), as a training run calls it. The policy that samples is the one that a rollout
batch's first optimizer step begins with, so its log-probs are both `rollout_logp` and `old_logp`; further steps are off-policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ablate_long_probe import probe
from ablate_long_world import ColdStart, Policy, World, cold_start, length_of
from torch import Tensor

from ctpo_megatron.algorithms import group_advantages, make_recipe, raise_if_nonfinite, recipe_loss
from ctpo_megatron.algorithms.statistics import merge
from ctpo_megatron.errors import NonFiniteError

ROLLOUTS, EVALUATION, PROBE = 1_000_003, 2_000_003, 4_000_037  # added to a seed, so that no two uses share their random numbers


@dataclass(frozen=True)
class Size:
    """What all runs of a sweep share."""

    blocks: int = 150
    groups: int = 32
    samples: int = 8  # trajectories of a group
    batches: int = 30
    optimizer_steps: int = 16  # on one rollout batch
    clip_grad: float = 1.0
    weight_decay: float = 0.01
    evaluation: int = 2048  # trajectories that a policy's reward is measured on
    probes: tuple[int, ...] = (7, 22)  # rollout batches after whose steps the variance is looked at; only in test runs
    cold: ColdStart = field(default_factory=ColdStart)


class Job(NamedTuple):
    """One run. Runs that are for tuning have seeds of their own."""

    method: str
    rate: float
    seed: int
    purpose: str  # tune or test

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.purpose} {self.method} {self.rate:.1e} {self.seed}"


class Rollouts(NamedTuple):
    """A rollout batch of N trajectories, group after group."""

    prompts: Tensor  # [N, 1 + BLOCK]
    written: Tensor  # [N, T]
    logp: Tensor  # [N, T], of the policy that sampled
    rewards: Tensor  # [N]
    advantages: Tensor  # [N]


def rollouts(world: World, policy: Policy, size: Size, generator: torch.Generator) -> Rollouts:
    """Sample `size.groups` prompts `size.samples` times each; GRPO's advantages."""
    prompts = world.prompts(size.groups, generator).repeat_interleave(size.samples, 0)
    written, logp = policy.sample(prompts, length_of(size.blocks), generator)
    rewards = world.rewards(prompts, written)
    advantages = [group_advantages(group) for group in rewards.view(size.groups, size.samples).tolist()]
    return Rollouts(prompts, written, logp, rewards, torch.tensor(advantages).flatten())


def batch_loss(recipe: Any, policy: Policy, part: Rollouts) -> Any:
    """The project's loss of some trajectories: `PolicyLoss`."""
    count, length = part.written.shape
    return recipe_loss(
        recipe,
        logp=policy.logp(part.prompts, part.written).flatten(),
        old_logp=part.logp.flatten(),
        rollout_logp=part.logp.flatten(),
        advantages=part.advantages.repeat_interleave(length),
        mask=torch.ones(count * length, dtype=torch.bool),
        cu_seqlens=torch.arange(count + 1) * length,
    )


def train_on(recipe: Any, policy: Policy, optimizer: torch.optim.Optimizer, batch: Rollouts, size: Size) -> dict[str, float]:
    """Take all optimizer steps on a rollout batch and say how they went. Raises NonFiniteError before a step that would spoil."""
    found, norms = [], []
    whole = torch.arange(len(batch.rewards)).view(size.optimizer_steps, -1)
    for rows in whole:
        out = batch_loss(recipe, policy, Rollouts(*(each[rows] for each in batch)))
        raise_if_nonfinite(out.stats)
        optimizer.zero_grad()
        out.loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), size.clip_grad))
        if not math.isfinite(norm):
            raise NonFiniteError(f"a gradient's norm is {norm}")
        optimizer.step()
        norms.append(norm)
        found.append(out.stats)
    stats = merge(found)
    means = {name: float(mean.total / mean.weight) for name, mean in stats.means.items()}
    return {
        "grad_norm": max(norms),
        "clip_fraction": means["clip_fraction"],
        "kl": means["kl_old"],
        "log_ratio_rms": math.sqrt(means["log_ratio_sq"]),
    }


def run(job: Job, objective: Mapping[str, Any], size: Size, cold: Path) -> dict[str, Any]:
    """What one run comes to; the same for the same arguments. A run whose numbers overflow has an `error` and final reward 0."""
    torch.set_num_threads(1)
    begun, world = time.process_time(), World.drawn(job.seed)
    policy, generator = load(cold, size), torch.Generator().manual_seed(job.seed + ROLLOUTS)
    recipe = make_recipe(objective, "sequence-mean", None, has_rollout=True)._replace(density=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=job.rate, weight_decay=size.weight_decay)
    before = torch.load(cold, weights_only=True)["about"]["before"]
    found: dict[str, Any] = {**job._asdict(), "error": None, "before": before, "rewards": [], "steps": [], "probes": []}
    try:
        for number in range(1, size.batches + 1):
            batch = rollouts(world, policy, size, generator)
            found["rewards"].append(float(batch.rewards.mean()))
            looking = job.purpose == "test" and number in size.probes
            fresh = rollouts(world, policy, size, torch.Generator().manual_seed(job.seed + PROBE + number)) if looking else None
            found["steps"].append(train_on(recipe, policy, optimizer, batch, size))
            if fresh is not None:
                found["probes"].append({"batch": number, **probe(policy, fresh, size.samples)})
    except NonFiniteError as error:
        found["error"] = str(error)
    found["final"] = 0.0 if found["error"] else reward_of(world, policy, job.seed, size)
    return found | {"cpu_s": time.process_time() - begun}


def reward_of(world: World, policy: Policy, seed: int, size: Size) -> float:
    """Mean reward on prompts and random numbers that no training uses, the same for every policy of a seed."""
    generator = torch.Generator().manual_seed(seed + EVALUATION)
    prompts = world.prompts(size.evaluation, generator)
    right = [world.rewards(part, policy.sample(part, length_of(size.blocks), generator)[0]) for part in prompts.split(512)]
    return float(torch.cat(right).mean())


def make_cold_start(seed: int, size: Size, file: Path) -> dict[str, float]:
    """Write a seed's cold start, which all methods begin with, and say how long it took."""
    torch.set_num_threads(1)
    policy, about = cold_start(size.cold, seed, size.blocks)
    about |= {"before": reward_of(World.drawn(seed), policy, seed, size)}
    part = file.with_suffix(".part")
    torch.save({"weights": policy.state_dict(), "about": about, "how": asdict(size.cold)}, part)
    part.rename(file)
    return about


def load(file: Path, size: Size) -> Policy:
    """The policy of a cold start."""
    policy = Policy(size.cold.width, 0)
    policy.load_state_dict(torch.load(file, weights_only=True)["weights"])
    return policy
