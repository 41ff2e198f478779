"""Importance weights for the distance between the trainer's old policy and the engine that sampled: a factor on any loss.

With e = old_logp - rollout_logp per token, a level's log-weight is e itself (`token`), its sum up to the token (`prefix`), over
the sequence (`sequence`) or the mean over the sequence (`geometric`). Truncated importance sampling (TIS) holds the weight to a
range, masked importance sampling (MIS) and IcePop (arXiv 2510.18855) set it to zero outside. No gradient; denominators of the
aggregation do not change.
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


def correction_factor(
    kind: str, level: str, low: float, high: float, *, mismatch: Tensor, scanned: Tensor | None, length: Tensor
) -> Tensor:
    """Factor of each token [T]. `scanned` [T]: the result of the level's channel; `length` [T]: tokens of the sequence."""
    log_weight = mismatch if scanned is None else scanned
    if level == "geometric":
        log_weight = log_weight / length
    weight = torch.exp(log_weight.clamp(-MAX_ABS, MAX_ABS))
    if kind == "truncate":
        return weight.clamp(low, high)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)
