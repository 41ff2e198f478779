"""CISPO, MiniMax-M1, arXiv 2506.13585: the clipped ratio is a weight without gradient, so that no token loses its gradient."""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.tokens import Method, TokenLoss, Tokens


def loss(tokens: Tokens, *, clip_low: float, clip_high: float) -> TokenLoss:
    """Per-token loss [T]: -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp."""
    log_ratio, advantages = tokens.log_ratio.detach(), tokens.advantages
    ratio = torch.exp(log_ratio)
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    high, low = (ratio > 1 + clip_high) & (advantages > 0), (ratio < 1 - clip_low) & (advantages < 0)
    return TokenLoss(-weight * advantages * tokens.logp, log_ratio, high, low)


CISPO = Method(loss)
