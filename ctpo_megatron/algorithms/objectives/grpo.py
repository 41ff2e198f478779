"""GRPO: token ratios with PPO clipping, arXiv 2402.03300; clip-higher arXiv 2503.14476; dual clip arXiv 1912.09729."""

from __future__ import annotations

from ctpo_megatron.algorithms.tokens import Method, TokenLoss, Tokens, clipped


def loss(tokens: Tokens, *, clip_low: float, clip_high: float, dual_clip: float | None) -> TokenLoss:
    """Per-token loss [T]: PPO's surrogate of the token's own ratio."""
    return clipped(tokens, tokens.log_ratio, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


GRPO = Method(loss)
