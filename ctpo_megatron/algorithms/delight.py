"""Delightful Policy Gradient, arXiv 2603.14608: a token counts by how delightful it is, advantage times surprisal.

The weight sigmoid(A l / eta), l = -logp, has no gradient. It multiplies the loss of any objective: a rare token counts in full
where it did well and hardly where it did badly; a likely one counts half either way. Not here is the whitening of A l over a
batch that some implementations add: a token's weight would depend on how the batch is cut up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.statistics import Stats, Weighted
from ctpo_megatron.algorithms.tokens import Tokens
from ctpo_megatron.config.objectives import DelightConfig


def delight(config: DelightConfig, tokens: Tokens) -> tuple[Tensor, Stats]:
    """The weight of each token [T], in (0, 1) or, centred, in (0, 2), and its statistics."""
    surprisal = -tokens.logp.detach()
    if config.max_surprisal is not None:
        surprisal = surprisal.clamp(max=config.max_surprisal)
    weight = torch.sigmoid(tokens.advantages * surprisal.clamp(min=0) / config.eta)
    if config.centred:
        weight = 2 * weight
    counted = torch.where(tokens.mask, weight, 0.0)
    return weight, Stats(means={"delight": Weighted(counted.sum(dtype=torch.float64), tokens.mask.sum().double())})
