"""The policy gradient with no importance ratio: what remains when tokens of another policy are taken as one's own."""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.tokens import Method, TokenLoss, Tokens


def loss(tokens: Tokens) -> TokenLoss:
    """Per-token loss [T]: -A logp. The ratio is in the record and nowhere else."""
    none = torch.zeros_like(tokens.mask)
    return TokenLoss(-tokens.advantages * tokens.logp, tokens.log_ratio, none, none)


REINFORCE = Method(loss)
