"""DRPO, arXiv 2606.09821: the policy gradient less a quadratic penalty on how far a token's probability has moved.

The derivative of a token's loss by its log-prob is -A r (1 - sign(A) (pi - mu) / epsilon): DPPO's mask, smoothed. Beyond epsilon
it turns round and leads back.
"""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.tokens import Method, TokenLoss, Tokens


def loss(tokens: Tokens, *, epsilon: float) -> TokenLoss:
    """Per-token loss [T]: -A r + |A| mu (r - 1)^2 / (2 epsilon). Where the gradient has turned round counts as held back."""
    log_ratio, advantages, mu = tokens.log_ratio, tokens.advantages, tokens.anchor.exp()
    ratio = torch.exp(log_ratio)
    found = -advantages * ratio + advantages.abs() * mu * (ratio - 1).square() / (2 * epsilon)
    moved = (mu * (ratio - 1)).detach()
    high, low = (moved > epsilon) & (advantages > 0), (moved < -epsilon) & (advantages < 0)
    return TokenLoss(found, log_ratio, high, low)


DRPO = Method(loss)
