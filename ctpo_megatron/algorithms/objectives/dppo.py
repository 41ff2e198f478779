"""DPPO, arXiv 2602.04879: a token is masked when its policy has moved too far, in divergence, the way its advantage pushes."""

from __future__ import annotations

import math

import torch

from ctpo_megatron.algorithms.divergence import divergence_from_rollout
from ctpo_megatron.algorithms.tokens import Given, Method, Statistic, TokenLoss, Tokens, kept


def statistics(given: Given, *, divergence: str, **_: float | None) -> dict[str, Statistic]:
    """The divergence between the sampling and the current policy at each token."""
    return {"divergence": divergence_from_rollout(divergence, given)}


def loss(tokens: Tokens, *, delta: float, ratio_cap: float | None, **_: str) -> TokenLoss:
    """Per-token loss [T]: -A sg(min(r, ratio_cap)) logp, masked where moving away and the divergence exceeds delta."""
    advantages, log_ratio = tokens.advantages, tokens.log_ratio.detach()
    weight = torch.exp(log_ratio).clamp(max=math.inf if ratio_cap is None else ratio_cap)
    away = ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))
    return kept(tokens, -advantages * weight * tokens.logp, ~(away & (tokens.statistics["divergence"] > delta)))


DPPO = Method(loss, statistics)
