"""How log-ratios and clipping depend on a token's position: the sums that `loop.health` makes a run's health panel of.

Each statistic is a vector with one sum per bin, so those of parts, micro-batches and ranks simply add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.tokens import TokenLoss, Tokens
from ctpo_megatron.kernels.numbers import DECILES as DECILES
from ctpo_megatron.kernels.numbers import POSITION_BINS as POSITION_BINS


def position_bin(position: Tensor) -> Tensor:
    """floor(log2(position)), exact, of 1-based positions [T] in floating point: [T] int, at most POSITION_BINS - 1."""
    return (torch.frexp(position).exponent - 1).clamp(max=POSITION_BINS - 1)


def health_sums(tokens: Tokens, out: TokenLoss, place: Tensor) -> dict[str, Tensor]:
    """Sums over a part's unmasked tokens: [POSITION_BINS] and [DECILES] float64.

    `place` [T] counts a trajectory's policy tokens like tokens.position, but not anew at restarts: deciles are of whole
    trajectories, whereas bins belong to the log-ratio, which begins anew there. The log-ratio is log rho_{1:t}, the sum up to
    and including the token, whatever ratio the objective itself uses.
    """
    mask, log_ratio = tokens.mask, tokens.prefix_sum.double()
    clipped = out.high | out.low if out.dual is None else out.high | out.low | out.dual
    decile = ((place - 1).clamp_(min=0) * DECILES / tokens.length).long().clamp_(0, DECILES - 1)
    ones = torch.ones_like(log_ratio)
    rows = [ones, tokens.position.double(), log_ratio, log_ratio.square(), clipped.double()]
    by_bin = _sums(rows, position_bin(tokens.position), mask, POSITION_BINS)
    (by_fate,) = _sums([ones], decile + DECILES * clipped, mask, 2 * DECILES)
    unclipped, cut = by_fate[:DECILES], by_fate[DECILES:]
    return {
        "health/tokens": by_bin[0],
        "health/position": by_bin[1],
        "health/log_ratio": by_bin[2],
        "health/log_ratio_sq": by_bin[3],
        "health/clipped": by_bin[4],
        "health/decile_tokens": unclipped + cut,
        "health/decile_clipped": cut,
    }


def _sums(rows: list[Tensor], bins: Tensor, mask: Tensor, count: int) -> list[Tensor]:
    """Sums of each of `rows` [T] over the unmasked tokens of each bin: [count]. Masked ones go to a bin of their own."""
    chosen = torch.where(mask, bins.clamp(0, count - 1), count).long()
    return [row.new_zeros(count + 1).index_add_(0, chosen, row)[:count] for row in rows]
