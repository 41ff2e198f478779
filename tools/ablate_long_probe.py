"""The variance of the gradient under each importance ratio, on trajectories that the policy was not trained on.

As `tools/variance_probe.py` does it, between the two policies before and after the optimizer steps on one rollout batch, and
besides for the whole trajectory: the variance of what a training step averages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradient_variance as gv
import torch
from torch import Tensor

from ctpo_megatron.errors import NonFiniteError

if TYPE_CHECKING:
    from ablate_long_run import Rollouts
    from ablate_long_world import Policy

POSITIONS = 6  # of a bin, at most, that are looked at


@torch.no_grad()
def probe(policy: Policy, fresh: Rollouts, samples: int) -> dict[str, Any]:
    """Variances of single tokens' and of whole trajectories' gradients by the output layer, each relative to the token ratio's.

    `fresh` are trajectories of the older policy, `samples` in a group. An `error` stands in place of the variances where all
    advantages are zero or a ratio overflows.
    """
    count, length = fresh.written.shape
    if not fresh.advantages.any():
        return {"error": "no group with rewards that differ"}
    hidden = policy.hidden(fresh.prompts, fresh.written)
    logits = policy.head(hidden)
    logp = torch.log_softmax(logits, -1).gather(-1, fresh.written[..., None])[..., 0]
    lengths = torch.full((count,), length)
    advantages = fresh.advantages.repeat_interleave(length)
    try:
        with torch.enable_grad():
            scales = gv.gradient_scales(logp.flatten(), fresh.logp.flatten(), advantages, lengths, {"type": "ctpo"})
    except NonFiniteError as error:
        return {"error": str(error)}
    prefix = gv.prefix_log_ratios(logp.flatten().double(), fresh.logp.flatten().double(), lengths).view(count, length)
    by_trajectory = scales.view(len(gv.ESTIMATORS), count, length)
    groups = torch.arange(count) // samples
    bins = []
    for each in gv.position_bins(length, POSITIONS):
        squares = torch.zeros(len(gv.ESTIMATORS), dtype=torch.float64)
        for place in (position - 1 for position in each.positions):
            kernel = gv.gradient_kernel(hidden[:, place], fresh.written[:, place], policy.head, 1.0)
            squares += gv.scatter(kernel, by_trajectory[..., place], groups, torch.ones(1, int(groups[-1]) + 1).double())[0][:, 0]
        about = {"first": each.first, "last": each.last, "log_ratio_std": float(prefix[:, each.positions[-1] - 1].std())}
        bins.append(about | {"relative": named(squares / squares[0])})
    spread, signal = whole_gradients(by_trajectory, hidden, logits, fresh.written)
    return {"bins": bins, "relative": named(spread / spread[0]), "signal": named(signal / spread)}


def whole_gradients(scales: Tensor, hidden: Tensor, logits: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Of a trajectory's whole gradient, under each estimator: trace of the covariance, and squared norm of the mean: [E] each.

    `scales` [E, N, T] as `gv.gradient_scales` has them, `hidden` [N, T, H], `logits` [N, T, V], `written` [N, T]. The squared
    norm is less what the covariance alone adds to it, so it may come out below zero.
    """
    error = torch.nn.functional.one_hot(written, logits.shape[-1]).double() - torch.softmax(logits.double(), -1)
    hidden, count = hidden.double(), len(written)
    spread, signal = [], []
    for scale in scales:
        gradients = torch.bmm((error * scale[..., None]).transpose(1, 2), hidden).flatten(1)  # [N, V * H]
        mean = gradients.mean(0)
        trace = (gradients - mean).square().sum() / (count - 1)
        spread.append(trace)
        signal.append(mean.square().sum() - trace / count)
    return torch.stack(spread), torch.stack(signal)


def named(values: Tensor) -> dict[str, float]:
    """The estimators' values [E] by name."""
    return dict(zip(gv.ESTIMATORS, values.tolist(), strict=True))
