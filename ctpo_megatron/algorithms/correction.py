"""Importance weights for the distance between the trainer's old policy and the engine that sampled: a factor on any loss.

With e = old_logp - rollout_logp per token, a level's log-weight is e itself (`token`), its sum up to the token (`prefix`), over
the sequence (`sequence`) or the mean over the sequence (`geometric`). Truncated importance sampling (TIS) holds the weight to a
range, masked importance sampling (MIS) and IcePop (arXiv 2510.18855) set it to zero outside. No gradient; denominators of the
aggregation do not change. What long sequences make of each level: docs/mismatch.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.operators import MAX_ABS
from ctpo_megatron.algorithms.scan import Channel, Reach

REACH: dict[str, Reach] = {"prefix": "prefix", "sequence": "sequence", "geometric": "sequence"}


def mismatch(old_logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """clamp(old_logp - rollout_logp, +-20) where unmasked, else 0: [T], no gradient."""
    return torch.where(mask, (old_logp - rollout_logp).detach(), 0.0).clamp(-MAX_ABS, MAX_ABS)


def correction_channel(level: str, mismatch: Tensor) -> Channel | None:
    """What `level` has to scan; None for tokens."""
    return None if level == "token" else Channel(mismatch, reach=REACH[level])


def log_weight(level: str, *, mismatch: Tensor, scanned: Tensor | None, length: Tensor) -> Tensor:
    """Log of each token's weight before anything is held back, +-20 at most [T].

    `scanned` [T]: the result of the level's channel; `length` [T]: tokens of the sequence.
    """
    found = mismatch if scanned is None else scanned
    return (found / length if level == "geometric" else found).clamp(-MAX_ABS, MAX_ABS)


def correction_factor(kind: str, low: float, high: float, weight: Tensor) -> Tensor:
    """Factor of each token [T]: its `weight` [T] held to [low, high] where `kind` is truncate, set to 0 outside otherwise."""
    if kind == "truncate":
        return weight.clamp(low, high)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)
