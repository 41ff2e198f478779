"""One rollout batch through a trainer rank: log-probs of the old policy, the drift alarm, then the optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctpo_megatron.algorithms import (
    Recipe,
    Scan,
    Seen,
    Stats,
    Support,
    algorithm_recipe,
    nll_loss,
    raise_if_nonfinite,
    recipe_loss,
    reference_penalty,
)
from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.statistics import NONFINITE
from ctpo_megatron.batch import Abandoned, AnchorStreams, MicroBatch, UpdateAbandoned
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.mcore.critic import critic_share, estimated, explained, present, whitened
from ctpo_megatron.mcore.kept_tokens import KeptTokens, SeenBy
from ctpo_megatron.mcore.old_policy import DRIFT, OldPolicy, check_drift
from ctpo_megatron.mcore.rank import TrainerRank
from ctpo_megatron.mcore.reference import Reference
from ctpo_megatron.record.values import Values, merge_values

if TYPE_CHECKING:  # megatron may be imported only after prepare_host
    from ctpo_megatron.mcore.step import LossFn


def update_policy(
    rank: TrainerRank,
    batches: list[list[MicroBatch]],
    *,
    algorithm: AlgorithmConfig,
    temperature: float,
    drift: DriftBounds,
    version: int,
    reference: Reference | None = None,
    kept: KeptTokens | None = None,
) -> Values:
    """One optimizer step per batch; the old policy is the one that stands before the first: see `old_policy`.

    `batches` hold this rank's micro-batches of each optimizer step; the device holds those of one step at a time. Returns the
    statistics of all steps as one, the same on all ranks. Raises MismatchError, before anything is changed, when trainer and
    engine disagree more than `drift` allows, and UpdateAbandoned, on every rank and before the step that would use it, for a
    log-prob, loss or gradient that is not finite. `reference`: the policy that `algorithm.reference` asks for. `kept`:
    gets what becomes of each token.
    """
    old = OldPolicy(rank.scan, algorithm.anchor, version, kept)
    before = _before(rank, old, batches, algorithm, temperature)
    sharded, measured = before.sharded, before.measured

    def judge() -> None:
        _require_finite(measured)
        check_drift(measured, drift, version)

    def check(values: Values) -> None:
        """Before the first optimizer step is applied: its pass completes what is known of the drift."""
        measured.update(merge_values([measured, {name: values.pop(name) for name in DRIFT}]))
        judge()

    if before.complete:
        judge()
    if reference is not None:
        with rank.using(reference):
            sharded = [_with_reference(rank, shards, temperature) for shards in sharded]
    loss = partial(policy_share, recipe=algorithm_recipe(algorithm), algorithm=algorithm)
    warming_up = algorithm.critic is not None and version < algorithm.critic.warmup_steps
    steps: list[Values] = []
    for number, shards in enumerate(sharded):
        try:
            placed = rank.on_device(shards)
            noted: LossFn = loss if kept is None else partial(loss, seen=kept.seen(number, placed))
            if number == 0 and not before.complete:
                steps.append(rank.train_step(placed, partial(old.share, noted, placed), temperature, check))
            else:
                steps.append(rank.train_step(placed, noted, temperature, warming_up=warming_up))
        except NonFiniteError as error:
            if kept is not None:
                kept.forget(number)
            if isinstance(error, UpdateAbandoned):
                raise
            anchors = [[_anchors_of(mb) for mb in shards]]
            update = Abandoned(str(error), number, error.sequence, merge_values(steps) | measured, anchors)
            raise UpdateAbandoned(update) from error
    return merge_values(steps) | measured


@dataclass(frozen=True, slots=True)
class _Before:
    """What passes before the first optimizer step have found."""

    sharded: list[list[MicroBatch]]  # this rank's shards of each optimizer step, with what was found
    measured: Values  # statistics of it
    complete: bool  # whether the first optimizer step's shards had such a pass as well


def _before(
    rank: TrainerRank, old: OldPolicy, batches: list[list[MicroBatch]], algorithm: AlgorithmConfig, temperature: float
) -> _Before:
    """The old policy's log-probs and, where a critic learns, values and advantages of the batches.

    Advantages come from values, so with a critic all batches have a pass; else the first optimizer step's own is that of its
    old policy.
    """
    first, *later = [rank.shard(batch) for batch in batches]
    critic = algorithm.gae
    if critic is None:
        sharded, ahead = [old.known(first)], list(enumerate(later, start=1))
    else:
        sharded, ahead = [], list(enumerate([first, *later]))
    stats: list[Stats] = []
    for number, shards in ahead:
        placed = rank.on_device(shards)
        if critic is None:
            logp, values = rank.logp(placed, temperature), []
        else:
            passed = rank.logp_and_values(placed, temperature)
            logp, values = [of[0] for of in passed], [present(of[1], "values") for of in passed]
        with_anchors, found = old.anchored(number, placed, shards, logp)
        if critic is not None:
            with_anchors, estimates = estimated(placed, with_anchors, values, rank.scan, critic)
            found = [gap | estimate for gap, estimate in zip(found, estimates, strict=True)]
        sharded.append(with_anchors)
        stats += found
    measured = rank.reduce(stats) if ahead else {}
    if critic is not None:
        sharded = whitened(sharded, measured) if critic.whiten else sharded
        measured = explained(measured)
    return _Before(sharded, measured, complete=critic is not None)


def _require_finite(measured: Values) -> None:
    """Raise UpdateAbandoned where a log-prob of the old policy is not finite; takes the mark of it away."""
    try:
        raise_if_nonfinite(measured)
    except NonFiniteError as error:
        raise UpdateAbandoned(Abandoned(str(error), None, error.sequence, {}, [])) from error
    measured.pop(NONFINITE, None)


def _anchors_of(mb: MicroBatch) -> AnchorStreams:
    """What the ranks of the last pipeline stage have added to a shard, in host memory; nothing before that stage."""
    streams = {"anchor_logp": mb.tokens.anchor_logp, "reference_logp": mb.tokens.reference_logp}
    return {name: stream.cpu() for name, stream in streams.items() if stream is not None}


def _with_reference(rank: TrainerRank, shards: list[MicroBatch], temperature: float) -> list[MicroBatch]:
    """One optimizer step's shards with the reference policy's log-probs, which only the last pipeline stage has.

    The reference policy chooses its experts itself.
    """
    logp = rank.logp(rank.on_device([replace(mb, replay=None) for mb in shards]), temperature)
    if not logp:
        return shards
    return [mb.with_streams(reference_logp=reference) for mb, reference in zip(shards, logp, strict=True)]


def supervise(rank: TrainerRank, batch: list[MicroBatch]) -> Values:
    """One optimizer step of maximum likelihood on the unmasked labels; returns its statistics.

    Raises UpdateAbandoned on every rank for a loss, log-prob or gradient that is not finite.
    """

    def share(logp: Tensor, mb: MicroBatch, scan: Scan) -> tuple[Tensor, Stats]:
        out = likelihood_loss(logp, mb, scan)
        return out.loss, out.stats

    try:
        return rank.train_step(rank.place(batch), share, 1.0)
    except NonFiniteError as error:
        raise UpdateAbandoned(Abandoned(str(error), 0, error.sequence, {}, [])) from error


def likelihood_loss(logp: Tensor, mb: MicroBatch, scan: Scan) -> PolicyLoss:
    """This rank's share of the supervised loss of one micro-batch."""
    sequences = mb.sequences
    return nll_loss(logp=logp, mask=mb.tokens.mask, cu_seqlens=sequences.cu_seqlens, weights=sequences.weights, scan=scan)


def policy_share(
    logp: Tensor, mb: MicroBatch, scan: Scan, *, recipe: Recipe, algorithm: AlgorithmConfig, seen: SeenBy | None = None
) -> tuple[Tensor, Stats]:
    """This rank's share of the loss of one micro-batch, as `step.LossFn` wants it: objective, correction, penalty."""
    tokens, sequences = mb.tokens, mb.sequences
    noted = None if seen is None else seen(mb)
    out = objective_loss(logp, mb, scan, recipe=recipe, algorithm=algorithm, seen=noted)
    loss, stats = out.loss, out.stats
    if algorithm.critic is not None:
        of_values, measured = critic_share(mb, scan, algorithm.critic)
        loss, stats = loss + of_values, stats | measured
    if algorithm.reference is None:
        return loss, stats
    penalty = reference_penalty(
        algorithm.reference.estimator,
        logp=logp,
        reference_logp=present(tokens.reference_logp, "reference_logp"),
        mask=tokens.mask,
        cu_seqlens=sequences.cu_seqlens,
        weights=sequences.weights,
        scan=scan,
    )
    return loss + algorithm.reference.coeff * penalty.loss, stats | penalty.stats


def objective_loss(
    logp: Tensor, mb: MicroBatch, scan: Scan, *, recipe: Recipe, algorithm: AlgorithmConfig, seen: list[Seen] | None = None
) -> PolicyLoss:
    """The same without the penalty, and token by token."""
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
