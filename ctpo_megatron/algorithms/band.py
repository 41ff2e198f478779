"""What CTPO's bounds grow with in place of the position: how much a trajectory may have moved by a token, as it is measured.

sqrt(t) is the growth of a sum of t log-ratios of equal variance. Where they are not equal, the sum of their variances takes its
place. A token's variance is measured by the square of its log-ratio (`variance`), or computed over the sampling policy's top-k
tokens and one outcome for the rest (`topk_variance`). The entropy of the sampling policy says where a policy can move at all; it
is measured by the surprisal of the sampled token (`entropy`), or computed likewise (`topk_entropy`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.divergence import TINY, with_rest
from ctpo_megatron.algorithms.operators import MAX_ABS, SUM, WIDE_SUM
from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import Given, Statistic, Support, Tokens


def band_statistics(band: str, band_unit: float | None, given: Given) -> dict[str, Statistic]:
    """The sum of the measure up to each token and, if it is its own unit, over the sequence; nothing for positions."""
    if band == "position":
        return {}
    measure = torch.where(given.mask, _measure(band, given), 0.0)
    adding = SUM if band.endswith("entropy") else WIDE_SUM  # exact sums hold values to 20, at steps that are coarse for squares
    found: dict[str, Statistic] = {"measured": Channel(measure, adding)}
    if band_unit is None:
        found["measured_total"] = Channel(measure, adding, "sequence")
    return found


def measured_position(band_unit: float | None, tokens: Tokens) -> Tensor:
    """How many positions the tokens up to t amount to [T]: their own number where nothing was measured in the sequence."""
    measured = tokens.statistics["measured"]
    if band_unit is not None:
        return measured / band_unit
    total = tokens.statistics["measured_total"]
    return torch.where(total > 0, measured * tokens.length / torch.where(total > 0, total, 1.0), tokens.position)


def _measure(band: str, given: Given) -> Tensor:
    if band == "variance":
        return given.log_ratio.square()
    if band == "entropy":
        return (-given.anchor).clamp(0, MAX_ABS)
    if given.support is None:
        raise ValueError(f"band {band!r} needs `support`: both policies' log-probs at the top-k tokens of the sampling policy")
    return _over_support(band, given.support)


def _over_support(band: str, support: Support) -> Tensor:
    """Variance of log pi - log mu, or entropy of mu [T], with a drawn from mu."""
    mu, pi = with_rest(support.rollout_logp.exp()), with_rest(support.logp.exp())
    log_mu = mu.clamp(min=TINY).log()
    if band == "topk_entropy":
        return -(mu * log_mu).sum(-1).clamp(max=0)
    moved = pi.clamp(min=TINY).log() - log_mu
    centred = moved - (mu * moved).sum(-1, keepdim=True)
    return (mu * centred.square()).sum(-1)
