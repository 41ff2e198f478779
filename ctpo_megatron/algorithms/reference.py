"""A penalty on the distance from a reference policy, by Schulman's estimators of KL(pi || ref) (joschu.net/blog/kl-approx, 2020).

With d = logp - reference_logp of a token that the policy wrote, clamped to +-10:

    estimator   value             derivative by logp    expected derivative on samples of pi
    k1          d                 d                     gradient of KL(pi || ref)
    k2          d^2 / 2           d                     gradient of KL(pi || ref)
    k3          exp(-d) - 1 + d   1 - exp(-d)           gradient of KL(ref || pi)

k2 and k3 are differentiated as they stand; beyond the clamp their derivative is 0. The derivative of k1 as it stands is 1, which
says nothing about the reference and is 0 in expectation; its derivative here is the score function's, which is k2's. Tokens of
an older policy are not reweighted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.scan import LocalScan, Scan
from ctpo_megatron.algorithms.statistics import Stats, Weighted
from ctpo_megatron.algorithms.tokens import MAX_LOG_RATIO


def reference_penalty(
    estimator: str,
    *,
    logp: Tensor,
    reference_logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    scan: Scan | None = None,
) -> PolicyLoss:
    """The estimate [T] of each unmasked token, and their sum weighted by sequence.

    Args:
        estimator: k1, k2 or k3.
        logp, reference_logp, mask: [T] streams; `logp` with grad.
        cu_seqlens, scan: as in `policy_loss`.
        weights: [N], of a token of each sequence, the same as in the loss that this is added to.

    The statistic `kl` is the plain mean over tokens. Raises ValueError for another estimator.
    """
    scan = scan or LocalScan()
    gap = torch.where(mask, logp - reference_logp.detach(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        square = 0.5 * gap.square()
        token = gap.detach() + (square - square.detach())
    elif estimator == "k2":
        token = 0.5 * gap.square()
    elif estimator == "k3":
        token = torch.expm1(-gap) + gap
    else:
        raise ValueError(f"estimator {estimator!r}; allowed are k1, k2, k3")
    per_token = scan.per_token(weights.to(token), cu_seqlens, token.numel())
    return PolicyLoss((token * per_token).sum(), token, _stats(token.detach(), mask))


def _stats(token: Tensor, mask: Tensor) -> Stats:
    return Stats(means={"kl": Weighted(token.sum(dtype=torch.float64), mask.sum().double())})
