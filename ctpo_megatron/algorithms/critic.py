"""Advantages and loss of a value function: GAE(lambda) of packed sequences (arXiv 1506.02438), and PPO's clipped value loss.

Only tokens that the policy wrote are steps: tool output passes everything through. With V the values, r the rewards, and k + 1
the next policy token after k, the lambda-return is

    G_k = r_k + gamma H_{k+1},   H_k = (1 - lambda) V_k + lambda G_k = (1 - lambda) V_k + lambda r_k + gamma lambda H_{k+1}

and the advantage G_k - V_k, which is GAE. So one affine scan of H from the end, without the token's own step, gives both: one
collective under context parallelism, whatever the sequences' lengths. Sums are float64; layouts agree to about 1e-12.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.operators import AFFINE
from ctpo_megatron.algorithms.scan import Channel, LocalScan, Scan
from ctpo_megatron.algorithms.statistics import Stats, Weighted


class Estimated(NamedTuple):
    """What a value function makes of rewards [T]: zero where masked, in the dtype of the values, no gradient."""

    advantages: Tensor
    returns: Tensor  # advantages + values: what the value function is trained on


def gae(
    *,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    scan: Scan | None = None,
) -> Estimated:
    """GAE(lambda) of whole sequences, or of context-parallel shards of them.

    Args:
        rewards, values, mask: [T] streams; a value is that of the state before the token. Anything may stand where masked.
        cu_seqlens, scan: as in `policy_loss`.
        gamma, lam: discount and lambda, in [0, 1], of a step: one token that the policy wrote.

    Behind the last step nothing is expected. To a trajectory that was cut off, add gamma times the value of the state behind it
    to its last reward. Raises ValueError for a gamma or lambda outside.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}={number:g}: allowed are numbers from 0 to 1")
    scan = scan or LocalScan()
    value, reward = (torch.where(mask, of.detach(), 0.0).double() for of in (values, rewards))
    factor = torch.where(mask, torch.full_like(value, gamma * lam), 1.0)
    steps = torch.stack([factor, (1 - lam) * value + lam * reward])
    (mixed,) = scan.run([Channel(steps, AFFINE, "after")], cu_seqlens)
    returns = torch.where(mask, reward + gamma * mixed.values, 0.0)
    return Estimated((returns - value).to(values.dtype), returns.to(values.dtype))


def value_loss(
    *,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    clip: float | None = 0.2,
    scan: Scan | None = None,
) -> PolicyLoss:
    """Half the squared error of each policy token [T], and their sum weighted by sequence.

    Args:
        values: [T] with grad; `old_values` [T] those before the first optimizer step, `returns` [T] from `gae`.
        clip: how far a value may move from its old one before the error stops rewarding it: the larger of both errors counts
            (PPO, arXiv 1707.06347). None: no clip.
        weights: [N], of a token of each sequence, as in the loss of the policy.

    Statistics, means over tokens: `clip_fraction`, the share whose error is the clipped one, and `loss`.
    """
    scan = scan or LocalScan()
    target, old = (torch.where(mask, of.detach(), 0.0).to(values.dtype) for of in (returns, old_values))
    present = torch.where(mask, values, 0.0)
    error = (present - target).square()
    clipped = torch.zeros_like(mask)
    token = error
    if clip is not None:
        held = (old + (present - old).clamp(-clip, clip) - target).square()
        clipped = (held > error).detach() & mask
        token = torch.maximum(error, held)
    token = 0.5 * token
    per_token = scan.per_token(weights.to(token), cu_seqlens, token.numel())
    count = mask.sum().double()
    totals = {"clip_fraction": clipped, "loss": token.detach()}
    return PolicyLoss((token * per_token).sum(), token, Stats(means=_means(totals, count)))


def value_stats(*, values: Tensor, returns: Tensor, advantages: Tensor, mask: Tensor) -> Stats:
    """Means over policy tokens of values, returns, advantages and squares.

    An advantage is the error of a value, so the share of the returns' variance that the values explain is
    1 - (advantage_sq - advantage^2) / (return_sq - return^2).
    """
    value, target, advantage = (torch.where(mask, of.detach(), 0.0).double() for of in (values, returns, advantages))
    totals = {
        "value": value,
        "return": target,
        "return_sq": target.square(),
        "advantage": advantage,
        "advantage_sq": advantage.square(),
    }
    return Stats(means=_means(totals, mask.sum().double()))


def _means(totals: dict[str, Tensor], count: Tensor) -> dict[str, Weighted]:
    return {name: Weighted(of.sum(dtype=torch.float64), count) for name, of in totals.items()}
