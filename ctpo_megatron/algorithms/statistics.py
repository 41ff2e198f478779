"""Statistics of a loss, for the record. Keys begin with how values combine over micro-batches and ranks: sum/ max/ min/."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ctpo_megatron.algorithms.prepare import Prepared, Streams
from ctpo_megatron.algorithms.scan import Scan
from ctpo_megatron.algorithms.tokens import TokenLoss, Tokens
from ctpo_megatron.errors import NonFiniteError

Stats = dict[str, Tensor]
_COMBINE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_POSITIONS = 2**30  # a non-finite token's place is coded as sequence * 2**30 + position, exact in float64


def token_stats(tokens: Tokens, out: TokenLoss) -> Stats:
    """Clip fractions and ratios of some tokens of a pack."""
    mask, log_ratio = tokens.mask, out.log_ratio.detach()
    ratio = torch.exp(torch.where(mask, log_ratio, -torch.inf))
    high, low = out.high & mask, out.low & mask
    dual = torch.zeros_like(mask) if out.dual is None else out.dual & mask
    return {
        "sum/tokens": _count(mask),
        "sum/clip_high": _count(high),
        "sum/clip_low": _count(low),
        "sum/clip_dual": _count(dual),
        "sum/clip_fraction": _count(high | low | dual),
        "sum/ratio": ratio.sum(dtype=torch.float64),
        "sum/ratio_sq": ratio.square().sum(dtype=torch.float64),
        "sum/kl_old": -tokens.log_ratio.detach().sum(dtype=torch.float64),
        "sum/log_ratio_sq": torch.where(mask, log_ratio, 0.0).square_().sum(dtype=torch.float64),
        "max/ratio": largest(torch.where(mask, ratio, -torch.inf)),
        "min/ratio": -largest(torch.where(mask, -ratio, -torch.inf)),
    }


def merge(parts: Iterable[Stats]) -> Stats:
    """Statistics of several parts as one."""
    merged: Stats = {}
    for stats in parts:
        for key, value in stats.items():
            merged[key] = _COMBINE[key.split("/")[0]](merged[key], value) if key in merged else value
    return merged


def found_in(streams: Streams, ready: Prepared, sequence_ids: Tensor | None, scan: Scan) -> Stats:
    """Statistics of the inputs: the distance of trainer and engine, and where the first log-prob is that is not finite."""
    mask, old, rollout = streams.mask, streams.old_logp, streams.rollout_logp
    total = streams.logp.detach() + old  # finite only if both are
    stats: Stats = {}
    if rollout is not None:
        total += rollout
        gap = torch.where(mask, (old - rollout).abs(), 0.0)
        stats = {"sum/drift": gap.sum(dtype=torch.float64), "max/drift": largest(gap)}
    if sequence_ids is None:
        sequence_ids = torch.arange(ready.lengths.numel(), device=mask.device)
    return stats | nonfinite_stats(~torch.isfinite(total) & mask, ready.place, sequence_ids, streams.cu_seqlens, scan)


def nonfinite_stats(bad: Tensor, position: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor, scan: Scan) -> Stats:
    """Where the first of the `bad` tokens [T] is: its sequence's number and its `position` [T] among the policy's tokens."""
    if not bad.numel():
        return {"min/nonfinite": position.new_full((), torch.inf, dtype=torch.float64)}
    first = bad.to(torch.uint8).argmax().unsqueeze(0)
    sequence = scan.per_token(sequence_ids.to(torch.int32), cu_seqlens, bad.numel())
    place = sequence[first].double() * _POSITIONS + position[first]
    return {"min/nonfinite": torch.where(bad[first], place, torch.inf).squeeze(0)}


def raise_if_nonfinite(stats: dict[str, Tensor] | dict[str, float]) -> None:
    """Raise NonFiniteError when a log-prob of the policy's own tokens was NaN or infinite; reads `stats`, so it synchronises.

    `policy_loss` itself never looks at values on the host; whoever applies its gradient calls this first.
    """
    place = float(stats.get("min/nonfinite", torch.inf))
    if place < torch.inf:
        sequence, position = divmod(int(place), _POSITIONS)
        raise NonFiniteError(
            f"the log-prob of a token that the policy wrote is NaN or infinite: sequence {sequence}, policy token {position} "
            "(sequences of a rollout batch count from 0, tokens from 1). Nothing was updated. Usual causes: a learning rate that "
            "is too high, a masked-out label, overflow in reduced precision."
        )


def _count(mask: Tensor) -> Tensor:
    return mask.sum().double()


def largest(values: Tensor) -> Tensor:
    """Also of no values: -inf."""
    return values.amax().double() if values.numel() else values.new_full((), -torch.inf, dtype=torch.float64)
