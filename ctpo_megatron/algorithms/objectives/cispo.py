"""CISPO, MiniMax-M1, arXiv 2506.13585: the clipped ratio is a weight without gradient, so that no token loses its gradient."""

from __future__ import annotations

from ctpo_megatron.algorithms.tokens import Method, TokenLoss, Tokens, weighted


def loss(tokens: Tokens, *, clip_low: float, clip_high: float) -> TokenLoss:
    """Per-token loss [T]: the token's own clipped ratio as the weight of -A logp."""
    return weighted(tokens, tokens.log_ratio, clip_low=clip_low, clip_high=clip_high)


CISPO = Method(loss)
