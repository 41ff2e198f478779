"""CTPO, arXiv 2605.07331: the ratio of a token is the product of all ratios up to it, its bounds grow with the position.

Two departures from the authors' code, neither of which changes a result beyond rounding: masked positions are zeroed before
anything is computed, so a NaN under the mask is harmless; and the gradient is carried as K + (logp - sg(logp)), which is exact,
instead of (K + logp) - sg(logp).
"""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.tokens import MAX_LOG_RATIO, TokenLoss, Tokens, carry_gradient, ratio_stats


def ctpo_loss(
    tokens: Tokens, *, ratio: str, clip_low: float, clip_high: float, dual_clip: float | None, power: float
) -> TokenLoss:
    """Per-token loss [T].

    With n the position among the sequence's policy tokens and s = n**power, the log-ratio L is clipped to
    [-clip_low * s, clip_high * s]; where the advantage is negative the ratio counts at most exp(dual_clip * s).
    The prefix sum enters without gradient: a token's gradient comes through its own log-prob alone.
    """
    prefix = tokens.prefix_sum if ratio == "cumulative" else tokens.prefix_sum / tokens.position
    log_ratio = carry_gradient(prefix, tokens.logp).clamp(max=MAX_LOG_RATIO)
    scale = tokens.position**power
    low, high = -clip_low * scale, clip_high * scale
    advantages = tokens.advantages
    plain = -advantages * torch.exp(log_ratio)
    clipped = -advantages * torch.exp(torch.maximum(torch.minimum(log_ratio, high), low))
    loss = torch.maximum(plain, clipped)
    negative = advantages < 0
    dual = torch.zeros_like(negative)
    if dual_clip is not None:
        ceiling = -advantages * torch.exp(dual_clip * scale)
        dual = negative & (loss > ceiling)
        loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    loss = torch.where(tokens.mask, loss, 0.0)
    stats = ratio_stats(
        tokens, log_ratio, high=(log_ratio > high) & (advantages > 0), low=(log_ratio < low) & negative, dual=dual
    )
    return TokenLoss(loss, stats)
