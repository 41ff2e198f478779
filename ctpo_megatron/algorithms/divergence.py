"""How far the current policy pi has moved from the policy mu that sampled, token by token.

k2, k3       estimates of KL(mu || pi) from the sampled token alone (Schulman 2020)
binary_*     over two outcomes: the sampled token and all others
topk_*       over mu's top-k tokens and the sampled one, and one outcome for the rest (arXiv 2606.10968)
*_tv, *_kl   total variation; KL(mu || pi), with probabilities held to [1e-8, 1 - 1e-8]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.tokens import Given
from ctpo_megatron.kernels.numbers import TINY


def divergence_from_rollout(kind: str, given: Given) -> Tensor:
    """Divergence at each token [T], at least 0. `given.anchor` are mu's log-probs.

    Raises ValueError for a top-k divergence without the top-k log-probs.
    """
    if kind == "k2":
        return 0.5 * given.log_ratio.square()
    if kind == "k3":
        return torch.expm1(given.log_ratio) - given.log_ratio
    support, _, measure = kind.partition("_")
    if support == "binary":
        mu, pi = given.anchor.exp().unsqueeze(-1), given.logp.exp().unsqueeze(-1)
    elif given.support is None:
        raise ValueError(
            f"divergence {kind!r} needs `support`: both policies' log-probs at the top-k tokens of the sampling policy"
        )
    else:
        mu, pi = given.support.rollout_logp.exp(), given.support.logp.exp()
    mu, pi = with_rest(mu), with_rest(pi)
    if measure == "tv":
        return 0.5 * (mu - pi).abs().sum(-1)
    mu, pi = mu.clamp(TINY, 1 - TINY), pi.clamp(TINY, 1 - TINY)
    return (mu * (mu.log() - pi.log())).sum(-1)


def with_rest(probabilities: Tensor) -> Tensor:
    """[T, K] and what is missing to 1: [T, K + 1]."""
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([probabilities, rest], dim=-1)
