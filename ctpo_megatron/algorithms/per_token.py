"""The per-token loss of a micro-batch, found part by part.

Every method's loss looks at one token at a time once the statistics are scanned. So a part's value and its derivative are found
by autograd and kept, two numbers per token, and the part's intermediates are freed before the next: memory does not depend on
the method, and the backward is one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctpo_megatron.algorithms.correction import correction_factor, log_weight
from ctpo_megatron.algorithms.delight import delight
from ctpo_megatron.algorithms.density import density_counts
from ctpo_megatron.algorithms.health import health_sums
from ctpo_megatron.algorithms.prepare import Prepared
from ctpo_megatron.algorithms.recipe import Recipe
from ctpo_megatron.algorithms.statistics import Stats, Weighted, largest, merge, token_stats
from ctpo_megatron.algorithms.tokens import Seen, Tokens
from ctpo_megatron.config.objectives import Correction

PART = 2**16  # tokens


class _Linearised(torch.autograd.Function):
    """Values [T] whose derivative by `logp` [T] is known."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def per_token_loss(recipe: Recipe, ready: Prepared, seen: list[Seen] | None = None) -> tuple[Tensor, Stats]:
    """Per-token loss [T] with grad, zero where masked, times delight and the correction's factor, and its statistics.

    `seen`: gets what became of the tokens, part by part.
    """
    tokens = ready.tokens
    value, slope = torch.zeros_like(tokens.logp), torch.zeros_like(tokens.logp)
    found: list[Stats] = []
    for begin in range(0, max(tokens.logp.numel(), 1), PART):
        part = slice(begin, begin + PART)
        value[part], slope[part], stats = _part(recipe, tokens.part(part), ready.place[part], seen)
        if recipe.correction is not None:
            stats |= _correct(recipe.correction, ready, part, value, slope)
        found.append(stats)
    return linearised(tokens.logp, value, slope), merge(found)


def linearised(logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value` [T] with grad: its derivative by `logp` is `slope`, [T] each."""
    found: Tensor = _Linearised.apply(logp, value, slope)
    return found


def _part(recipe: Recipe, tokens: Tokens, place: Tensor, seen: list[Seen] | None) -> tuple[Tensor, Tensor, Stats]:
    """Loss, its derivative and statistics of some tokens."""
    with torch.enable_grad():
        out = recipe.method.loss(tokens, **recipe.options)
        (slope,) = torch.autograd.grad(out.loss.sum(), tokens.logp)
    if seen is not None:
        seen.append(Seen.of(out))
    # masked tokens have advantage 0, so their loss and slope are 0
    sums = health_sums(tokens, out, place) | (density_counts(tokens) if recipe.density else {})
    stats, value = token_stats(tokens, out) | Stats(sums=sums), out.loss.detach()
    if recipe.delight is not None:
        weight, of_weight = delight(recipe.delight, tokens)
        value, slope, stats = weight * value, weight * slope, stats | of_weight
    return value, slope, stats


def _correct(correction: Correction, ready: Prepared, part: slice, value: Tensor, slope: Tensor) -> Stats:
    """Multiply a part's loss and derivative by the correction's factor, in place."""
    if ready.mismatch is None:
        raise ValueError("a correction needs the mismatch that `prepare` finds for a recipe with one")
    gap, scanned, mask = ready.mismatch[part], ready.scanned_mismatch, ready.tokens.mask[part]
    logs = log_weight(
        correction.level,
        mismatch=gap,
        scanned=None if scanned is None else scanned[part],
        length=ready.tokens.length[part],
    )
    weight = logs.exp()
    kind = "truncate" if correction.type == "truncate" else "mask"
    factor = correction_factor(kind, correction.low, correction.high, weight)
    value[part] *= factor
    slope[part] *= factor
    counted, before = torch.where(mask, factor, 0.0), torch.where(mask, weight, 0.0)
    count = mask.sum().double()
    totals = {
        "correction": counted.sum(dtype=torch.float64),
        "correction_sq": counted.square().sum(dtype=torch.float64),
        "correction_zero": ((factor == 0) & mask).sum().double(),
        "correction_before": before.sum(dtype=torch.float64),
        "correction_log": torch.where(mask, logs, 0.0).sum(dtype=torch.float64),
    }
    return Stats(
        means={name: Weighted(total, count) for name, total in totals.items()},
        maxima={"correction_max": largest(counted), "correction_before_max": largest(before)},
    )
