"""What every objective is given about the tokens of a pack, and what it gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms.scan import MAX_ABS, Scan

MAX_LOG_RATIO = 10.0  # of the reference implementation: exp(10) is far outside every clip window
Stats = dict[str, Tensor]


class Tokens(NamedTuple):
    """Per-token inputs [T] of an objective; masked positions hold zeros, whatever was there before."""

    logp: Tensor  # with grad
    advantages: Tensor
    mask: Tensor  # bool
    log_ratio: Tensor  # clamp(logp - anchor, +-20), detached
    prefix_sum: Tensor  # of log_ratio over the sequence's unmasked tokens up to and including t
    position: Tensor  # 1-based index among the sequence's unmasked tokens; at least 1
    sequence_length: Tensor  # unmasked tokens of the token's whole sequence; at least 1


class TokenLoss(NamedTuple):
    """An objective's result: unreduced loss [T] (zero where masked) and its statistics."""

    loss: Tensor
    stats: Stats


def prepare(
    logp: Tensor, anchor: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor, scan: Scan
) -> tuple[Tokens, Tensor]:
    """The tokens, and the number of unmasked tokens of each whole sequence [N] float64. One scan, hence one collective."""
    zero = logp.new_zeros(())
    logp = torch.where(mask, logp, zero)
    log_ratio = torch.where(mask, (logp - anchor).detach(), zero).clamp(-MAX_ABS, MAX_ABS)
    sums = scan.prefix_sums(torch.stack([log_ratio, mask.to(log_ratio.dtype)]), cu_seqlens)
    lengths = sums.totals[1]
    tokens = Tokens(
        logp=logp,
        advantages=torch.where(mask, advantages.to(logp.dtype), zero),
        mask=mask,
        log_ratio=log_ratio,
        prefix_sum=sums.inclusive[0].to(logp.dtype),
        position=sums.inclusive[1].to(logp.dtype).clamp(min=1),
        sequence_length=lengths[scan.sequence_ids(cu_seqlens)].to(logp.dtype).clamp(min=1),
    )
    return tokens, lengths


def carry_gradient(value: Tensor, logp: Tensor) -> Tensor:
    """`value` with the gradient of `logp`: bit-equal to `value`, as logp - sg(logp) is exactly zero."""
    return value.detach() + (logp - logp.detach())


def ratio_stats(tokens: Tokens, log_ratio: Tensor, *, high: Tensor, low: Tensor, dual: Tensor) -> Stats:
    """Statistics every clipped objective reports. Keys start with how they add up over ranks: sum, max or min.

    `high`, `low`, `dual` [T] bool: tokens whose gradient the upper, lower and dual clip removed.
    """
    mask = tokens.mask
    log_ratio = torch.where(mask, log_ratio.detach(), 0.0)
    ratio = torch.exp(log_ratio)
    return {
        "sum/tokens": mask.sum().float(),
        "sum/clip_high": (high & mask).sum().float(),
        "sum/clip_low": (low & mask).sum().float(),
        "sum/clip_dual": (dual & mask).sum().float(),
        "sum/clip_fraction": ((high | low | dual) & mask).sum().float(),
        "sum/ratio": torch.where(mask, ratio, 0.0).sum().float(),
        "sum/kl_old": -tokens.log_ratio.sum().float(),
        "sum/log_ratio_sq": log_ratio.square().sum().float(),
        "max/ratio": ratio.max().float() if ratio.numel() else ratio.new_ones((), dtype=torch.float32),
        "min/ratio": ratio.min().float() if ratio.numel() else ratio.new_ones((), dtype=torch.float32),
    }
