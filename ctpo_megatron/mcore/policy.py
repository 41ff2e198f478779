"""One rollout batch through a trainer rank: log-probs of the old policy, the drift alarm, then the optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ctpo_megatron.algorithms import (
    Channel,
    Recipe,
    Scan,
    Seen,
    Stats,
    Support,
    Weighted,
    make_recipe,
    nll_loss,
    raise_if_nonfinite,
    recipe_loss,
    reference_penalty,
)
from ctpo_megatron.algorithms.health import POSITION_BINS, position_bin
from ctpo_megatron.algorithms.loss import PolicyLoss
from ctpo_megatron.algorithms.statistics import NONFINITE, nonfinite_stats
from ctpo_megatron.batch import Abandoned, AnchorStreams, MicroBatch, UpdateAbandoned
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.errors import MismatchError, NonFiniteError
from ctpo_megatron.mcore.kept_tokens import KeptTokens, SeenBy
from ctpo_megatron.mcore.rank import TrainerRank
from ctpo_megatron.mcore.reference import Reference
from ctpo_megatron.record.values import Mean, Value, Values, merge_values, scalar


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
    """One optimizer step per batch; the old policy is the one that stands before the first.

    `batches` hold this rank's micro-batches of each optimizer step; the device holds those of one step at a time. Returns the
    statistics of all steps as one, the same on all ranks. Raises MismatchError, before anything is changed, when trainer and
    engine disagree more than `drift` allows, and UpdateAbandoned, on every rank and before the step that would use it, for a
    log-prob, loss or gradient that is not finite. `reference`: the policy that `algorithm.reference` asks for. `kept`:
    gets what becomes of each token.
    """
    sharded: list[list[MicroBatch]] = []
    gaps: list[Stats] = []
    for batch in batches:
        shards, differences = _anchored(rank, rank.shard(batch), algorithm.anchor, temperature, version, kept)
        sharded.append(shards)
        gaps += differences
    measured = rank.reduce(gaps)
    try:
        raise_if_nonfinite(measured)
    except NonFiniteError as error:
        raise UpdateAbandoned(Abandoned(str(error), None, error.sequence, {}, [])) from error
    del measured[NONFINITE]
    check_drift(measured, drift, version)
    if reference is not None:
        with rank.using(reference):
            sharded = [_with_reference(rank, shards, temperature) for shards in sharded]
    # sequences have their weights from the batch as a whole, so the recipe's aggregation is never asked
    recipe = make_recipe(algorithm.objective, algorithm.aggregation, algorithm.correction, has_rollout=True)
    loss = partial(policy_share, recipe=recipe, algorithm=algorithm)
    steps: list[Values] = []
    for number, shards in enumerate(sharded):
        try:
            placed = rank.on_device(shards)
            noted = loss if kept is None else partial(loss, seen=kept.seen(number, placed))
            steps.append(rank.train_step(placed, noted, temperature))
        except NonFiniteError as error:
            if kept is not None:
                kept.forget(number)
            anchors = [[_anchors_of(mb) for mb in shards]]
            update = Abandoned(str(error), number, error.sequence, merge_values(steps) | measured, anchors)
            raise UpdateAbandoned(update) from error
    return merge_values(steps) | measured


def _anchors_of(mb: MicroBatch) -> AnchorStreams:
    """What the ranks of the last pipeline stage have added to a shard, in host memory; nothing before that stage."""
    streams = {"anchor_logp": mb.tokens.anchor_logp, "reference_logp": mb.tokens.reference_logp}
    return {name: stream.cpu() for name, stream in streams.items() if stream is not None}


def _anchored(
    rank: TrainerRank, shards: list[MicroBatch], anchor: str, temperature: float, version: int, kept: KeptTokens | None
) -> tuple[list[MicroBatch], list[Stats]]:
    """One optimizer step's shards with the log-probs that ratios are taken against, and their distance from the engine's.

    Only the last pipeline stage has log-probs. They stay on the device; the shards are there only while they are computed.
    """
    micro_batches = rank.on_device(shards)
    old = rank.logp(micro_batches, temperature)
    if not old:
        return shards, []
    if kept is not None:
        kept.before([logp - mb.tokens.rollout_logp for mb, logp in zip(micro_batches, old, strict=True)])
    gaps = [drift_stats(mb, logp, rank.scan, version) for mb, logp in zip(micro_batches, old, strict=True)]
    anchors = [anchor_logp(mb, logp, anchor, version) for mb, logp in zip(micro_batches, old, strict=True)]
    return [mb.with_streams(anchor_logp=each) for mb, each in zip(shards, anchors, strict=True)], gaps


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


def anchor_logp(mb: MicroBatch, old_logp: Tensor, anchor: str, version: int) -> Tensor:
    """Log-probs [T] that ratios are taken against; see `AlgorithmConfig.anchor`. `version` is the trainer's present one."""
    tokens = mb.tokens
    if anchor == "old":
        return old_logp
    if anchor == "rollout":
        return tokens.rollout_logp
    return torch.where(tokens.versions == version, old_logp, tokens.rollout_logp)


def policy_share(
    logp: Tensor, mb: MicroBatch, scan: Scan, *, recipe: Recipe, algorithm: AlgorithmConfig, seen: SeenBy | None = None
) -> tuple[Tensor, Stats]:
    """This rank's share of the loss of one micro-batch, as `step.LossFn` wants it: objective, correction, penalty."""
    tokens, sequences = mb.tokens, mb.sequences
    noted = None if seen is None else seen(mb)
    out = objective_loss(logp, mb, scan, recipe=recipe, algorithm=algorithm, seen=noted)
    if algorithm.reference is None:
        return out.loss, out.stats
    penalty = reference_penalty(
        algorithm.reference.estimator,
        logp=logp,
        reference_logp=_present(tokens.reference_logp, "reference_logp"),
        mask=tokens.mask,
        cu_seqlens=sequences.cu_seqlens,
        weights=sequences.weights,
        scan=scan,
    )
    return out.loss + algorithm.reference.coeff * penalty.loss, out.stats | penalty.stats


def objective_loss(
    logp: Tensor, mb: MicroBatch, scan: Scan, *, recipe: Recipe, algorithm: AlgorithmConfig, seen: list[Seen] | None = None
) -> PolicyLoss:
    """The same without the penalty, and token by token."""
    tokens, sequences = mb.tokens, mb.sequences
    return recipe_loss(
        recipe,
        logp=logp,
        old_logp=_present(tokens.anchor_logp, "anchor_logp"),
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
    rollout = _present(tokens.top_k_logp, "top_k_logp")
    unused = rollout == -torch.inf
    among = ((tokens.top_k_ids == tokens.labels.unsqueeze(-1)) & ~unused).any(-1)
    sampled = [torch.where(among, -torch.inf, of.detach()).unsqueeze(-1) for of in (logp, tokens.rollout_logp)]
    policy = torch.where(unused, -torch.inf, _present(tokens.policy_top_k_logp, "policy_top_k_logp"))
    return Support(torch.cat([policy, sampled[0]], -1), torch.cat([rollout, sampled[1]], -1))


def _present(stream: Tensor | None, name: str) -> Tensor:
    """A stream that the step needs. Raises ValueError where an earlier part of it did not add the stream."""
    if stream is None:
        raise ValueError(f"the micro-batch has no {name}")
    return stream


def drift_stats(mb: MicroBatch, logp: Tensor, scan: Scan, version: int) -> Stats:
    """Distance of trainer and engine on the tokens that `version` itself sampled, in all and by position."""
    tokens, sequences = mb.tokens, mb.sequences
    counted = tokens.mask & (tokens.versions == version)
    gap = torch.where(counted, (logp - tokens.rollout_logp).abs(), 0.0)
    (count,) = scan.run([Channel(tokens.mask)], sequences.cu_seqlens)
    position = count.values.clamp(min=1)
    bins = position_bin(position)
    by_bin = gap.new_zeros(POSITION_BINS).index_add_(0, bins, gap)
    count_by_bin = gap.new_zeros(POSITION_BINS).index_add_(0, bins, counted.to(gap.dtype))
    stats = Stats(
        means={
            "drift/mean": Weighted(gap.sum(), counted.sum()),
            "drift/from_token": Weighted(by_bin, count_by_bin),
        },
        maxima={"drift/max": gap.max()},
    )
    return stats | nonfinite_stats(~torch.isfinite(logp) & tokens.mask, position, sequences.ids, sequences.cu_seqlens, scan)


def check_drift(measured: dict[str, Value], bound: DriftBounds, version: int) -> None:
    """Raise MismatchError when a bound is passed; a NaN passes every bound."""
    tokens = measured["drift/mean"].weight if isinstance(measured["drift/mean"], Mean) else 0.0
    for kind, limit in {"max": bound.max, "mean": bound.mean if tokens >= bound.tokens else None}.items():
        value = scalar(measured[f"drift/{kind}"])
        if limit is not None and not value <= limit:
            raise MismatchError(
                f"trainer and inference engine disagree about the log-probs of policy version {version}: {kind} |difference| is "
                f"{value:.3g}, drift.{kind} allows {limit:.3g} ({tokens:.0f} tokens). Either the weights did not "
                f"arrive, or the two compute differently (dtype, kernels); raise drift.{kind} only if you know which."
            )
