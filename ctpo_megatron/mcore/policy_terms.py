"""The loss of one micro-batch on one rank: the objective and what is added to it, or the supervised loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Channel, Recipe, Scan, Seen, Stats, Support, nll_loss, recipe_loss, reference_penalty
from ctpo_megatron.algorithms.distillation import Signal, teacher_signal, weighted_signal
from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.statistics import Weighted
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.algorithm import AlgorithmConfig, ReferenceConfig
from ctpo_megatron.config.distillation import DistillationConfig
from ctpo_megatron.mcore.critic import critic_share, present
from ctpo_megatron.mcore.kept_tokens import SeenBy

Term = tuple[float, PolicyLoss]  # a coefficient, and what it multiplies


def policy_share(
    logp: Tensor, mb: MicroBatch, scan: Scan, *, recipe: Recipe, algorithm: AlgorithmConfig, seen: SeenBy | None = None
) -> tuple[Tensor, Stats]:
    """This rank's share of the loss of one micro-batch, as `step.LossFn` wants it: that of `policy_terms`, and the
    critic's."""
    out = policy_terms(logp, mb, scan, recipe=recipe, algorithm=algorithm, seen=None if seen is None else seen(mb))
    if algorithm.critic is None:
        return out.loss, out.stats
    of_values, measured = critic_share(mb, scan, algorithm.critic)
    return out.loss + of_values, out.stats | measured


def policy_terms(
    logp: Tensor, mb: MicroBatch, scan: Scan, *, recipe: Recipe, algorithm: AlgorithmConfig, seen: list[Seen] | None = None
) -> PolicyLoss:
    """The loss of a policy step: objective with its correction, penalty, distillation. All scan in one collective."""
    distillation, reference = algorithm.distillation, algorithm.reference
    signal = None if distillation is None else _signal(logp, mb, scan)
    also = [] if signal is None else signal.channels
    objective = objective_loss(logp, mb, scan, recipe=recipe, algorithm=algorithm, seen=seen, also=also)
    terms: list[Term] = [(1.0 if distillation is None else distillation.objective_coeff, objective)]
    if reference is not None:
        terms.append((reference.coeff, _penalty(reference, logp, mb, scan)))
    if distillation is not None and signal is not None:
        sequences = mb.sequences
        layout = {"cu_seqlens": sequences.cu_seqlens, "weights": sequences.weights}
        taught = weighted_signal(signal, objective.also, **layout, gamma=distillation.gamma, scan=scan)
        stats = taught.stats | Stats(means=_kl_by_teacher(distillation, signal, mb, scan))
        terms.append((distillation.coeff, taught._replace(stats=stats)))
    return _sum(terms)


def _sum(terms: Sequence[Term]) -> PolicyLoss:
    """Losses of the same tokens, each times its coefficient."""
    (coeff, first), *others = terms
    loss, token_loss, stats = coeff * first.loss, coeff * first.token_loss, first.stats
    for coeff, each in others:
        loss, token_loss, stats = loss + coeff * each.loss, token_loss + coeff * each.token_loss, stats | each.stats
    return PolicyLoss(loss, token_loss, stats)


def _penalty(reference: ReferenceConfig, logp: Tensor, mb: MicroBatch, scan: Scan) -> PolicyLoss:
    tokens, sequences = mb.tokens, mb.sequences
    return reference_penalty(
        reference.estimator,
        logp=logp,
        reference_logp=present(tokens.reference_logp, "reference_logp"),
        mask=tokens.mask,
        cu_seqlens=sequences.cu_seqlens,
        weights=sequences.weights,
        scan=scan,
    )


def _signal(logp: Tensor, mb: MicroBatch, scan: Scan) -> Signal:
    """What their teachers say of a micro-batch's tokens; those of sequences that nobody teaches are masked."""
    tokens, teacher = mb.tokens, teacher_of_tokens(mb, scan)
    if teacher is None:
        nobody, zeros = torch.zeros_like(tokens.mask), torch.zeros_like(tokens.rollout_logp)
        return teacher_signal(logp=logp, sampled_logp=zeros, teacher_logp=zeros, mask=nobody)
    return teacher_signal(
        logp=logp,
        sampled_logp=tokens.rollout_logp,
        teacher_logp=present(tokens.teacher_logp, "teacher_logp"),
        mask=tokens.mask & (teacher >= 0),
    )


def teacher_of_tokens(mb: MicroBatch, scan: Scan) -> Tensor | None:
    """The place of each local token's teacher [T], -1: nobody. None where no sequence has one."""
    teachers = mb.sequences.teachers
    return None if teachers is None else scan.per_token(teachers, mb.sequences.cu_seqlens, mb.tokens.mask.numel())


def _kl_by_teacher(distillation: DistillationConfig, signal: Signal, mb: MicroBatch, scan: Scan) -> dict[str, Weighted]:
    """The distance to each teacher over the tokens that it teaches."""
    teacher = teacher_of_tokens(mb, scan)
    found: dict[str, Weighted] = {}
    for place, each in enumerate(distillation.teachers):
        own = signal.mask if teacher is None else signal.mask & (teacher == place)
        total = torch.where(own, -signal.gap, 0.0).sum(dtype=torch.float64)
        found[f"teacher/kl/{each.name}"] = Weighted(total, own.sum().double())
    return found


def objective_loss(
    logp: Tensor,
    mb: MicroBatch,
    scan: Scan,
    *,
    recipe: Recipe,
    algorithm: AlgorithmConfig,
    seen: list[Seen] | None = None,
    also: Sequence[Channel] = (),
) -> PolicyLoss:
    """The objective with its correction alone. `also`: what others want scanned with it."""
    tokens, sequences = mb.tokens, mb.sequences
    return recipe_loss(
        recipe,
        logp=logp,
        old_logp=present(tokens.anchor_logp, "anchor_logp"),
        advantages=tokens.advantages,
        mask=tokens.mask,
        cu_seqlens=sequences.cu_seqlens,
        rollout_logp=tokens.rollout_logp,
        weights=sequences.weights,
        restarts=tokens.restarts if algorithm.restart_at_version else None,
        sequence_ids=sequences.ids,
        support=support_of(mb, logp),
        scan=scan,
        seen=seen,
        also=also,
    )


def support_of(mb: MicroBatch, logp: Tensor) -> Support | None:
    """Both policies at the sampling policy's top-k tokens and, where it is none of them, the sampled one: [T, K + 1].

    None where the run does not collect top-k tokens.
    """
    tokens = mb.tokens
    if tokens.top_k_ids is None:
        return None
    rollout = present(tokens.top_k_logp, "top_k_logp")
    unused = rollout == -torch.inf
    among = ((tokens.top_k_ids == tokens.labels.unsqueeze(-1)) & ~unused).any(-1)
    sampled = [torch.where(among, -torch.inf, of.detach()).unsqueeze(-1) for of in (logp, tokens.rollout_logp)]
    policy = torch.where(unused, -torch.inf, present(tokens.policy_top_k_logp, "policy_top_k_logp"))
    return Support(torch.cat([policy, sampled[0]], -1), torch.cat([rollout, sampled[1]], -1))


def likelihood_loss(logp: Tensor, mb: MicroBatch, scan: Scan) -> PolicyLoss:
    """This rank's share of the supervised loss of one micro-batch."""
    sequences = mb.sequences
    return nll_loss(logp=logp, mask=mb.tokens.mask, cu_seqlens=sequences.cu_seqlens, weights=sequences.weights, scan=scan)
