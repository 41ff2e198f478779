"""One rollout batch through a trainer rank: log-probs of the old policy, the drift alarm, then the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctpo_megatron.algorithms import (
    Scan,
    Stats,
    algorithm_recipe,
    raise_if_nonfinite,
)
from ctpo_megatron.algorithms.statistics import NONFINITE
from ctpo_megatron.batch import Abandoned, AnchorStreams, MicroBatch, UpdateAbandoned
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.mcore.critic import estimated, explained, present, whitened
from ctpo_megatron.mcore.kept_tokens import KeptTokens
from ctpo_megatron.mcore.old_policy import DRIFT, OldPolicy, check_drift
from ctpo_megatron.mcore.policy_terms import likelihood_loss, policy_share, teacher_of_tokens
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
    teachers: Mapping[int, Reference] | None = None,
    kept: KeptTokens | None = None,
    density: bool = False,
) -> Values:
    """One optimizer step per batch; the old policy is the one that stands before the first: see `old_policy`.

    `batches` hold this rank's micro-batches of each optimizer step; the device holds those of one step at a time. Returns the
    statistics of all steps as one, the same on all ranks. Raises MismatchError, before anything is changed, when trainer and
    engine disagree more than `drift` allows, and UpdateAbandoned, on every rank and before the step that would use it, for a
    log-prob, loss or gradient that is not finite. `reference`: the policy that `algorithm.reference` asks for. `teachers`: those
    of `algorithm.distillation` that are copied, by their places. `kept`: gets what becomes of each token. `density`: whether
    log-ratios are counted, see `Recipe`.
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
    sharded = _with_others(rank, sharded, temperature, reference, teachers or {})
    loss = partial(policy_share, recipe=algorithm_recipe(algorithm, density=density), algorithm=algorithm)
    warming_up = algorithm.critic is not None and version < algorithm.critic.warmup_steps
    steps: list[Values] = []
    for number, shards in enumerate(sharded):
        try:
            placed, more = rank.on_device(shards), number + 1 < len(sharded)
            noted: LossFn = loss if kept is None else partial(loss, seen=kept.seen(number, placed))
            if number == 0 and not before.complete:
                steps.append(rank.train_step(placed, partial(old.share, noted, placed), temperature, check, more=more))
            else:
                steps.append(rank.train_step(placed, noted, temperature, warming_up=warming_up, more=more))
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


def _with_others(
    rank: TrainerRank,
    sharded: list[list[MicroBatch]],
    temperature: float,
    reference: Reference | None,
    teachers: Mapping[int, Reference],
) -> list[list[MicroBatch]]:
    """The shards of all optimizer steps with the log-probs of the policies that are asked besides, in passes of their own."""
    if reference is not None:
        with rank.using(reference):
            sharded = [_with_reference(rank, shards, temperature) for shards in sharded]
    for place, teacher in teachers.items():
        with rank.using(teacher):
            sharded = [_with_teacher(rank, shards, temperature, place) for shards in sharded]
    return sharded


def _require_finite(measured: Values) -> None:
    """Raise UpdateAbandoned where a log-prob of the old policy is not finite; takes the mark of it away."""
    try:
        raise_if_nonfinite(measured)
    except NonFiniteError as error:
        raise UpdateAbandoned(Abandoned(str(error), None, error.sequence, {}, [])) from error
    measured.pop(NONFINITE, None)


def _anchors_of(mb: MicroBatch) -> AnchorStreams:
    """What the ranks of the last pipeline stage have added to a shard, in host memory; nothing before that stage."""
    streams = {name: getattr(mb.tokens, name) for name in ("anchor_logp", "reference_logp", "teacher_logp")}
    return {name: stream.cpu() for name, stream in streams.items() if stream is not None}


def _with_reference(rank: TrainerRank, shards: list[MicroBatch], temperature: float) -> list[MicroBatch]:
    """One optimizer step's shards with the reference policy's log-probs, which only the last pipeline stage has."""
    logp = _other_logp(rank, shards, temperature)
    return [mb.with_streams(reference_logp=reference) for mb, reference in zip(shards, logp, strict=True)] if logp else shards


def _with_teacher(rank: TrainerRank, shards: list[MicroBatch], temperature: float, place: int) -> list[MicroBatch]:
    """The shards with the log-probs of the teacher at `place` at the tokens that it teaches."""
    logp = _other_logp(rank, shards, temperature)
    return [_told(mb, said, rank.scan, place) for mb, said in zip(shards, logp, strict=True)] if logp else shards


def _told(mb: MicroBatch, said: Tensor, scan: Scan, place: int) -> MicroBatch:
    """A shard with what the teacher at `place` `said` of all its tokens [T] at those that it teaches."""
    teacher, known = teacher_of_tokens(mb, scan), mb.tokens.teacher_logp
    if teacher is None:
        return mb
    known = torch.zeros_like(said) if known is None else known.to(said.device)
    return mb.with_streams(teacher_logp=torch.where(teacher.to(said.device) == place, said, known))


def _other_logp(rank: TrainerRank, shards: list[MicroBatch], temperature: float) -> list[Tensor]:
    """Log-probs of shards by the weights that are in the model's place, which choose their experts themselves."""
    return rank.logp(rank.on_device([replace(mb, replay=None) for mb in shards]), temperature)


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


def assess(rank: TrainerRank, batch: list[MicroBatch]) -> Values:
    """The statistics of `supervise`'s loss with the weights as they are, the same on every rank."""
    placed = rank.place(batch)
    logp = rank.logp(placed, 1.0)  # of the last pipeline stage, from where the statistics come
    measured = [likelihood_loss(own, mb, rank.scan).stats for own, mb in zip(logp, placed, strict=True)] if logp else []
    return rank.reduce(measured)
