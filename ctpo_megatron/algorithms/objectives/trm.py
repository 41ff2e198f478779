"""TRM, arXiv 2512.23075: sequences whose divergence from the sampling policy is too large are left out, whole.

They stay in the denominator of every mean. The criterion looks neither at the advantage nor at the direction.
"""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.divergence import divergence_from_rollout
from ctpo_megatron.algorithms.operators import MAX, SUM, WIDE_SUM
from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import Given, Method, Statistic, TokenLoss, Tokens, kept


def statistics(given: Given, *, divergence: str, **_: float | None) -> dict[str, Statistic]:
    """The largest divergence of the sequence's policy tokens, and their sum."""
    found = torch.where(given.mask, divergence_from_rollout(divergence, given), 0.0)
    adding = WIDE_SUM if divergence in ("k2", "k3") else SUM  # exact sums hold values to 20
    return {"largest": Channel(found, MAX, "sequence"), "total": Channel(found, adding, "sequence")}


def loss(tokens: Tokens, *, max_divergence: float | None, mean_divergence: float | None, **_: str) -> TokenLoss:
    """Per-token loss [T]: -A r of the sequences that keep to both bounds; a bound of None is not applied."""
    keep = torch.ones_like(tokens.mask)
    if max_divergence is not None:
        keep = keep & (tokens.statistics["largest"] <= max_divergence)
    if mean_divergence is not None:
        keep = keep & (tokens.statistics["total"] / tokens.length <= mean_divergence)
    return kept(tokens, -tokens.advantages * torch.exp(tokens.log_ratio), keep)


TRM = Method(loss, statistics)
