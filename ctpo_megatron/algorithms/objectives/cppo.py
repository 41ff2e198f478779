"""CPPO, arXiv 2606.10968: a budget for the divergence that a prefix may have used up, next to a bound for each token.

With n the position among the sequence's T policy tokens, D the divergence and w = 1 - (1 - weight_min) (n - 1) / (T - 1):
a token whose ratio moves away from 1 the way its advantage pushes is masked where w D exceeds
min(delta, delta + budget * W - S), W and S being the sums of w and w D over the tokens before it, masked ones included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.divergence import divergence_from_rollout
from ctpo_megatron.algorithms.operators import RAMP
from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import Given, Method, Quantile, Statistic, TokenLoss, Tokens, kept


def statistics(
    given: Given, *, divergence: str, adaptive_budget: bool, adaptive_quantile: float, **_: float
) -> dict[str, Statistic]:
    """D, and its plain and position-weighted sums over the tokens before t: w is linear in n, so S is a mix of the two."""
    spent = torch.where(given.mask, divergence_from_rollout(divergence, given), 0.0)
    found: dict[str, Statistic] = {
        "divergence": spent,
        "spent": Channel(spent, reach="before"),
        "ramp": Channel(torch.stack([given.mask.to(spent.dtype), spent]), RAMP, "before"),
    }
    if adaptive_budget:
        found["typical"] = Quantile(spent, adaptive_quantile)
    return found


def loss(
    tokens: Tokens,
    *,
    delta: float,
    budget: float,
    weight_min: float,
    adaptive_max: float,
    adaptive_factor: float,
    **_: str | bool | float,
) -> TokenLoss:
    """Per-token loss [T]: -A r of the tokens within budget, which with a `typical` divergence follows that."""
    own, before = tokens.statistics, tokens.position - 1
    slope = torch.where(tokens.length > 1, (1 - weight_min) / (tokens.length - 1).clamp(min=1), 0.0)
    weight = 1 - slope * before
    weights_before = before - slope * before * (before - 1) / 2
    spent_before = own["spent"] - slope * own["ramp"]
    allowance: Tensor | float = budget
    if "typical" in own:
        allowance = (adaptive_factor * own["typical"]).clamp(budget, adaptive_max * budget)
    limit = torch.clamp(delta + allowance * weights_before - spent_before, max=delta)
    ratio = torch.exp(tokens.log_ratio)
    advantages = tokens.advantages
    keep = (advantages * (ratio - 1) <= 0) | (weight * own["divergence"] <= limit)
    return kept(tokens, -advantages * ratio, keep)


CPPO = Method(loss, statistics)
