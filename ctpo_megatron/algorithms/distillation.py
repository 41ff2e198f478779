"""On-policy distillation: the student follows a teacher on sequences that the student wrote.

    sampled   a_t = log pi_T - log mu of the sampled token, without gradient; loss -w_t a_t log pi. With w = 1 its expected
              derivative is that of the reverse KL(pi || pi_T) at each token.
    top-k     the reverse KL itself over the teacher's top-k tokens and one outcome for the rest; loss w_t D_t, with gradient.
    w_t       1 + gamma (1 - sum of |a_j| over j < t / sum of |a_j|): IW-OPD, arXiv 2606.22600. Early tokens count more than those
              behind a prefix that the teacher would not have written. For top-k, D_j takes the place of |a_j| (ours).

The prefix and the total are two rows of one scan: one collective under context parallelism, none in the backward; `recipe_loss`
takes them along in its own. A token that nobody teaches is masked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms.divergence import TINY, with_rest
from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.operators import MAX_ABS
from ctpo_megatron.algorithms.scan import Channel, LocalScan, Scan, Scanned
from ctpo_megatron.algorithms.statistics import Stats, Weighted

SMALLEST = 1e-8  # of a sequence's total discrepancy


class Likeliest(NamedTuple):
    """Both policies at the teacher's top-k tokens; -inf marks an unused column."""

    logp: Tensor  # [T, K], of the student, with grad
    teacher_logp: Tensor  # [T, K]


class Signal(NamedTuple):
    """What a teacher says of each token [T], before a token knows what precedes it."""

    token: Tensor  # loss of weight 1, zero where masked, with grad
    discrepancy: Tensor  # at least 0, zero where masked, no grad
    gap: Tensor  # log pi_T - log mu of the sampled token, zero where masked, no grad
    mask: Tensor  # bool

    @property
    def channels(self) -> list[Channel]:
        """Returns what `prefix_weights` wants scanned, with whatever else a caller scans at the same time."""
        return [Channel(self.discrepancy, reach="before"), Channel(self.discrepancy, reach="sequence")]


def teacher_signal(
    *, logp: Tensor, sampled_logp: Tensor, teacher_logp: Tensor, mask: Tensor, likeliest: Likeliest | None = None
) -> Signal:
    """What a teacher says of each token; arguments as in `distillation_loss`."""
    gap = torch.where(mask, (teacher_logp - sampled_logp).detach(), 0.0).clamp(-MAX_ABS, MAX_ABS).to(logp.dtype)
    if likeliest is None:
        return Signal(-gap * torch.where(mask, logp, 0.0), gap.abs(), gap, mask)
    plain = reverse_kl(likeliest, mask)
    return Signal(plain, plain.detach().clamp(0, MAX_ABS), gap, mask)


def distillation_loss(
    *,
    logp: Tensor,
    sampled_logp: Tensor,
    teacher_logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    gamma: float = 0.5,
    likeliest: Likeliest | None = None,
    scan: Scan | None = None,
) -> PolicyLoss:
    """The loss of each policy token [T], zero where masked, and their sum weighted by sequence.

    Args:
        logp, mask: [T] streams; `logp` of the student with grad. Anything may stand where masked.
        sampled_logp: [T], of the student when it sampled; `teacher_logp` [T] of the teacher, both at the sampled tokens.
        gamma: how much the first tokens count more than the last. IW-OPD: 0.5. 0: plain distillation.
        likeliest: both policies at the teacher's top-k tokens, for the reverse KL in place of its sampled form.
        cu_seqlens, weights, scan: as in `reference_penalty`.

    Statistics as of `weighted_signal`. Raises ValueError for a negative gamma.
    """
    scan = scan or LocalScan()
    signal = teacher_signal(logp=logp, sampled_logp=sampled_logp, teacher_logp=teacher_logp, mask=mask, likeliest=likeliest)
    scanned = scan.run(signal.channels, cu_seqlens)
    return weighted_signal(signal, scanned, cu_seqlens=cu_seqlens, weights=weights, gamma=gamma, scan=scan)


def weighted_signal(
    signal: Signal, scanned: Sequence[Scanned], *, cu_seqlens: Tensor, weights: Tensor, gamma: float, scan: Scan
) -> PolicyLoss:
    """`distillation_loss` of a signal whose channels have been `scanned`; arguments as there.

    Statistics, means over tokens: `teacher/kl` (the mean of mu's log-prob less the teacher's, an estimate of the reverse
    KL(mu || teacher)), `teacher/weight`. Raises ValueError for a negative gamma.
    """
    if gamma < 0:
        raise ValueError(f"gamma={gamma:g}: allowed are 0 (plain on-policy distillation) and numbers above")
    weight = prefix_weights(signal.discrepancy, scanned, gamma, cu_seqlens, scan)
    token = weight * signal.token
    per_token = scan.per_token(weights.to(token), cu_seqlens, token.numel())
    count = signal.mask.sum().double()
    totals = {"teacher/kl": -signal.gap, "teacher/weight": torch.where(signal.mask, weight, 0.0)}
    means = {name: Weighted(of.sum(dtype=torch.float64), count) for name, of in totals.items()}
    return PolicyLoss((token * per_token).sum(), token, Stats(means=means))


def prefix_weights(discrepancy: Tensor, scanned: Sequence[Scanned], gamma: float, cu_seqlens: Tensor, scan: Scan) -> Tensor:
    """1 + gamma (1 - sum before t / sum) of a discrepancy [T] that is at least 0, and 0 where masked: [T], no gradient.

    `scanned`: the sum before t and the sum.
    """
    before, total = scanned
    whole = scan.per_token(total.totals.clamp(min=SMALLEST).to(discrepancy.dtype), cu_seqlens, discrepancy.numel())
    return 1 + gamma * (1 - before.values / whole)


def reverse_kl(likeliest: Likeliest, mask: Tensor) -> Tensor:
    """KL(student || teacher) over the columns and one outcome for the rest [T], zero where masked, with grad."""
    columns = mask.unsqueeze(-1) & torch.isfinite(likeliest.teacher_logp)
    student, teacher = (
        with_rest(torch.where(columns, torch.where(columns, of, 0.0).exp(), 0.0))
        for of in (likeliest.logp, likeliest.teacher_logp.detach())
    )
    terms = student * (student.clamp(min=TINY).log() - teacher.clamp(min=TINY).log())
    return torch.where(mask, terms.sum(-1), 0.0)
