"""CTPO, arXiv 2605.07331: the ratio of a token is the product of all ratios up to it, its bounds grow with the position.

Departures from the authors' code, none of which changes a loss beyond rounding: masked positions are zeroed before anything is
computed, so a NaN under the mask is harmless; the gradient is carried as K + (logp - sg(logp)), which is exact, instead of
(K + logp) - sg(logp); and their two minima and a maximum are one clamp, whose gradient exactly at a bound is torch's choice.
"""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.band import band_statistics, measured_position
from ctpo_megatron.algorithms.tokens import MAX_LOG_RATIO, Given, Method, Statistic, TokenLoss, Tokens, carry_gradient


def statistics(given: Given, *, band: str, band_unit: float | None, **_: str | float | None) -> dict[str, Statistic]:
    """What a measured band sums up."""
    return band_statistics(band, band_unit, given)


def loss(
    tokens: Tokens,
    *,
    ratio: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    power: float,
    band: str,
    band_unit: float | None,
) -> TokenLoss:
    """Per-token loss [T].

    With n the position among the sequence's policy tokens, or what `band` measures in its place, and s = n**power: the log-ratio
    L is clipped to [-clip_low * s, clip_high * s]; where the advantage is negative the ratio counts at most exp(dual_clip * s).
    """
    prefix = tokens.prefix_sum if ratio == "cumulative" else tokens.prefix_sum / tokens.position
    log_ratio = carry_gradient(prefix, tokens.logp).clamp(max=MAX_LOG_RATIO)
    position = tokens.position if band == "position" else measured_position(band_unit, tokens)
    scale, advantages = position**power, tokens.advantages
    low, high, negative = -clip_low * scale, clip_high * scale, advantages < 0
    ceiling = torch.full_like(scale, torch.inf) if dual_clip is None else dual_clip * scale
    # the larger of the plain and the clipped loss, as one clamp: only the side that the advantage pushes to is bounded
    bounded = log_ratio.clamp(torch.where(negative, low, -torch.inf), torch.where(negative, ceiling, high))
    held = log_ratio.detach()
    return TokenLoss(
        -advantages * torch.exp(bounded),
        held,
        high=(held > high) & (advantages > 0),
        low=(held < low) & negative,
        dual=None if dual_clip is None else (held > ceiling) & negative,
        band=None if band == "position" else position / tokens.position,
    )


CTPO = Method(loss, statistics)
