"""CTPO's loss and its derivative at each token, from prefix sums and positions: `algorithms.objectives.ctpo` in one pass.

Forward and backward are one: the derivative of a token's loss by its own log-prob is the loss, or 0 where clipped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctpo_megatron.kernels.numbers import MAX_LOG_RATIO

BLOCK = 1024


class Judged(NamedTuple):
    """What became of tokens [T]; zeros where masked."""

    value: Tensor  # loss
    slope: Tensor  # its derivative by the token's log-prob
    held: Tensor  # log-ratio, at most 10
    fate: Tensor  # uint8, bits: 1 high, 2 low, 4 dual


@triton.jit
def _power(n, power, KIND: tl.constexpr):
    scale = n
    if KIND == 0:
        scale = tl.exp(tl.log(n) * power)
    elif KIND == 1:
        scale = tl.sqrt(n)
    elif KIND == 2:
        scale = n * 0 + 1
    return scale


@triton.jit
def _judge(
    prefix, position, advantages, mask, value, slope, held, fate, count, clip_low, clip_high, dual_clip, power, top,
    GEOMEAN: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    counts = tl.load(mask + place, mask=inside, other=0) != 0
    n = tl.maximum(tl.load(position + place, mask=counts, other=1).to(tl.float32), 1)
    a = tl.load(advantages + place, mask=counts, other=0).to(tl.float32)
    raw = tl.load(prefix + place, mask=counts, other=0).to(tl.float32)
    if GEOMEAN:
        raw = raw / n
    ratio = tl.minimum(raw, top)
    scale = _power(n, power, POWER)
    low, high, ceiling = -clip_low * scale, clip_high * scale, dual_clip * scale
    negative = a < 0
    over, under, dual = (ratio > high) & (negative == 0), (ratio < low) & negative, (ratio > ceiling) & negative
    bounded = tl.where(over, high, tl.where(under, low, tl.where(dual, ceiling, ratio)))
    loss = -a * tl.exp(bounded)
    loss = tl.where(counts, loss, 0.0)
    flat = over | under | dual | (raw > top)
    bits = tl.where(over & (a > 0), 1, 0) + tl.where(under, 2, 0) + tl.where(dual, 4, 0)
    tl.store(value + place, loss, mask=inside)
    tl.store(slope + place, tl.where(flat, 0.0, loss), mask=inside)
    tl.store(held + place, tl.where(counts, ratio, 0.0), mask=inside)
    tl.store(fate + place, bits.to(tl.uint8), mask=inside)


def judge(
    prefix: Tensor,
    position: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: str = "cumulative",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    power: float,
) -> Judged:
    """Loss, derivative and fate of tokens [T], float32; anything may stand in `advantages` where `mask` [T] is False.

    `prefix`, `position` [T]: sums of log-ratios, and 1-based positions, up to and with each token. Options as in the config.
    """
    value, slope, held = (torch.empty(prefix.shape, dtype=torch.float32, device=prefix.device) for _ in range(3))
    fate = torch.empty(prefix.shape, dtype=torch.uint8, device=prefix.device)
    count = prefix.numel()
    if count:
        kind, most = {0.5: 1, 0.0: 2, 1.0: 3}.get(power, 0), math.inf if dual_clip is None else dual_clip
        _judge[(triton.cdiv(count, BLOCK),)](
            prefix.contiguous(), position.contiguous(), advantages.contiguous(), mask.contiguous().view(torch.uint8),
            value, slope, held, fate, count, clip_low, clip_high, most, power, MAX_LOG_RATIO,
            GEOMEAN=ratio == "geomean", POWER=kind, BLOCK=BLOCK,
        )  # fmt: skip
    return Judged(value, slope, held, fate)
