"""KPop, the successor of IcePop in the Ring models: a token counts while its probability has not moved too far in KL.

The divergence is that of two outcomes, the sampled token or another, the larger of its two directions. It looks neither at the
advantage nor at where the ratio has moved. The prefix gates hold back a token for what came before it as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.operators import MAX
from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import Given, Method, Statistic, TokenLoss, Tokens, kept

TINY = 1e-6  # probabilities are held to [TINY, 1 - TINY]


def two_way_kl(logp: Tensor, other: Tensor) -> Tensor:
    """The larger of KL(p || q) and KL(q || p) of sampled token or not [T], with p = exp(logp) and q = exp(other); at most 14."""
    p, q = (of.exp().clamp(TINY, 1 - TINY) for of in (logp, other))
    chosen, rest = p.log() - q.log(), torch.log1p(-p) - torch.log1p(-q)
    return torch.maximum(p * chosen + (1 - p) * rest, -q * chosen - (1 - q) * rest)


def statistics(given: Given, *, gate: str, **_: float) -> dict[str, Statistic]:
    """What is held to delta: the divergence, or its maximum or sum over the tokens up to t."""
    found = torch.where(given.mask, two_way_kl(given.logp, given.anchor), 0.0)
    if gate == "token":
        return {"divergence": found}
    return {"divergence": Channel(found, MAX) if gate == "prefix_max" else Channel(found)}


def loss(tokens: Tokens, *, delta: float, penalty: float, **_: str) -> TokenLoss:
    """Per-token loss [T]: -A r of the tokens within delta, plus penalty (log r)^2 of all."""
    out = kept(tokens, -tokens.advantages * torch.exp(tokens.log_ratio), tokens.statistics["divergence"] <= delta)
    return out._replace(loss=out.loss + penalty * tokens.log_ratio.square()) if penalty else out


KPOP = Method(loss, statistics)
