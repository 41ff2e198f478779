"""How log-ratios are distributed at each position: counts from which it follows what any window of ratios would clip.

Two distributions, of S_t and of S_t / sqrt(t), as a window of one width at all positions looks at the first and a window that
grows with the root of t at the second. Counts add up over parts, micro-batches and ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctpo_megatron.algorithms.health import POSITION_BINS, position_bin
from ctpo_megatron.algorithms.tokens import Tokens
from ctpo_megatron.kernels.numbers import BUCKETS as BUCKETS
from ctpo_megatron.kernels.numbers import SIGNS as SIGNS

# of S_t and of S_t / sqrt(t): about 0 buckets are a fifth of it wide, from there on they grow with the value
FINEST = (0.02, 0.005)
REACH = 7.0  # asinh of the largest value over FINEST; what is beyond is in the first or last bucket


def edges(finest: float) -> list[float]:
    """Returns the borders [BUCKETS + 1] of the buckets, in nats."""
    return [finest * math.sinh(REACH * (2 * place / BUCKETS - 1)) for place in range(BUCKETS + 1)]


def density_counts(tokens: Tokens) -> dict[str, Tensor]:
    """Returns `health/density`: how many unmasked tokens of a part are in each bucket, float64, flat.

    Its axes are (S_t, S_t / sqrt(t)), sign of the advantage [SIGNS], range of positions [POSITION_BINS], bucket [BUCKETS].
    """
    total, position = tokens.prefix_sum.double(), tokens.position.double()
    row = ((torch.sign(tokens.advantages) + 1).long() * POSITION_BINS + position_bin(position).clamp(min=0)) * BUCKETS
    size = SIGNS * POSITION_BINS * BUCKETS
    found = total.new_zeros(2, size + 1)
    one = torch.ones((), dtype=total.dtype, device=total.device).expand_as(total)
    for counts, values, finest in zip(found, (total, total / position.sqrt()), FINEST, strict=True):
        place = (torch.asinh(values / finest) / REACH + 1) * (BUCKETS / 2)
        # a log-ratio that is not finite ends the step before anybody looks at its counts
        bucket = place.nan_to_num(0.0).clamp_(0, BUCKETS - 1).long()
        counts.index_add_(0, torch.where(tokens.mask, row + bucket, size), one)
    return {"health/density": found[:, :size].reshape(-1)}
