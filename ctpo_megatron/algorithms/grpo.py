"""GRPO: token ratios with PPO clipping, arXiv 2402.03300; clip-higher arXiv 2503.14476; dual clip arXiv 1912.09729."""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.tokens import TokenLoss, Tokens, carry_gradient, ratio_stats


def grpo_loss(tokens: Tokens, *, clip_low: float, clip_high: float, dual_clip: float | None) -> TokenLoss:
    """Per-token loss [T]: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A * dual_clip where A < 0."""
    log_ratio = carry_gradient(tokens.log_ratio, tokens.logp)
    ratio = torch.exp(log_ratio)
    advantages = tokens.advantages
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    negative = advantages < 0
    dual = torch.zeros_like(negative)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        dual = negative & (loss > ceiling)
        loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    loss = torch.where(tokens.mask, loss, 0.0)
    stats = ratio_stats(
        tokens,
        log_ratio,
        high=(ratio > 1 + clip_high) & (advantages > 0),
        low=(ratio < 1 - clip_low) & negative,
        dual=dual,
    )
    return TokenLoss(loss, stats)
