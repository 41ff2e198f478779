"""GMPO, arXiv 2507.20673: the geometric mean over a sequence of token ratios that are clipped one by one, on one side.

Written per token: all tokens of a sequence have the loss -A R, and each carries the gradient of its own part of R, so that the
mean over the sequence's tokens has the value and the gradient of the paper's sequence loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import Given, Method, Statistic, TokenLoss, Tokens, carry_gradient


def one_sided(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """sgn(A) min(sgn(A) d, sgn(A) clip(d)) [T]: held back only where the ratio has moved the way the advantage pushes."""
    sign = torch.sign(advantages)
    return sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))


def statistics(given: Given, *, clip_low: float, clip_high: float) -> dict[str, Statistic]:
    """The sum of one-sidedly clipped log-ratios over the whole sequence."""
    held = one_sided(given.log_ratio, given.advantages, clip_low, clip_high)
    return {"total": Channel(held, reach="sequence")}


def loss(tokens: Tokens, *, clip_low: float, clip_high: float) -> TokenLoss:
    """Per-token loss [T]: -A R with R = exp(mean of the sequence's clipped log-ratios)."""
    log_ratio, advantages = tokens.log_ratio, tokens.advantages
    held = one_sided(log_ratio, advantages, clip_low, clip_high)
    mean = carry_gradient(tokens.statistics["total"] / tokens.length, held)
    high, low = (log_ratio > clip_high) & (advantages > 0), (log_ratio < -clip_low) & (advantages < 0)
    return TokenLoss(-advantages * torch.exp(mean), mean, high, low)


GMPO = Method(loss, statistics)
