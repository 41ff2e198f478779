"""Maximum likelihood, for supervised training."""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.scan import LocalScan, Scan
from ctpo_megatron.algorithms.statistics import Stats, Weighted


def nll_loss(
    *, logp: Tensor, mask: Tensor, cu_seqlens: Tensor, weights: Tensor | None = None, scan: Scan | None = None
) -> PolicyLoss:
    """Negative log-likelihood of the unmasked tokens [T], weighted by sequence.

    `weights` [N]: weight of a token of each sequence. None: the mean over the tokens at hand, for whole sequences only.
    Other arguments and the result as in `policy_loss`.
    """
    scan = scan or LocalScan()
    token_loss = torch.where(mask, -logp, 0.0)
    count = mask.sum().double()
    stats = Stats(sums={"tokens": count}, means={"nll": Weighted(token_loss.detach().sum(dtype=torch.float64), count)})
    if weights is None:
        return PolicyLoss(token_loss.sum() / mask.sum().clamp(min=1), token_loss, stats)
    per_token = scan.per_token(weights.to(token_loss), cu_seqlens, token_loss.numel())
    return PolicyLoss((token_loss * per_token).sum(), token_loss, stats)
