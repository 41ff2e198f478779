"""SAPO, arXiv 2511.20347: a sigmoid around ratio 1 in place of a clip, steeper where the advantage is not positive."""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.tokens import Method, TokenLoss, Tokens


def loss(tokens: Tokens, *, tau_positive: float, tau_negative: float) -> TokenLoss:
    """Per-token loss [T]: -A (4 / tau) sigmoid(tau (r - 1)); its slope at r = 1 is that of -A r. Nothing is clipped."""
    log_ratio, advantages = tokens.log_ratio, tokens.advantages
    tau = torch.full_like(log_ratio, tau_negative).masked_fill(advantages > 0, tau_positive)
    soft = torch.sigmoid(tau * (torch.exp(log_ratio) - 1)) * (4 / tau)
    none = torch.zeros_like(tokens.mask)
    return TokenLoss(-advantages * soft, log_ratio, none, none)


SAPO = Method(loss)
