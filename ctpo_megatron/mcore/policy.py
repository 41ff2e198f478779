"""One rollout batch through the engine: old log-probs, the drift alarm, then the optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Channel, Scan, Support, nll_loss, policy_loss, raise_if_nonfinite, reference_penalty
from ctpo_megatron.algorithms.health import POSITION_BINS, position_bin
from ctpo_megatron.algorithms.statistics import nonfinite_stats
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.cluster import DriftConfig
from ctpo_megatron.errors import MismatchError
from ctpo_megatron.mcore.host_weights import Snapshot
from ctpo_megatron.mcore.rank import TrainerRank


def update_policy(
    engine: TrainerRank,
    batches: list[list[MicroBatch]],
    *,
    algorithm: AlgorithmConfig,
    temperature: float,
    drift: DriftConfig,
    version: int,
    reference: Snapshot | None = None,
) -> dict[str, float]:
    """One optimizer step per batch; the old policy is the one that stands before the first.

    `batches` hold this rank's micro-batches of each optimizer step. Returns the merged statistics of all steps (keys sum/, max/,
    min/ over all ranks; plain keys are means over steps). Raises MismatchError, before anything is changed, when trainer and
    engine disagree more than `drift` allows, and NonFiniteError, before the step that would use it, for a log-prob that is not
    finite. `reference`: weights of the policy that `algorithm.reference` asks for.
    """
    anchored: list[list[MicroBatch]] = []
    gaps: list[dict[str, Tensor]] = []
    for batch in batches:
        micro_batches = engine.place(batch)
        old = engine.logp(micro_batches, temperature)
        if old:  # last pipeline stage; the others never look at log-probs
            gaps += [drift_stats(mb, logp, engine.scan, version) for mb, logp in zip(micro_batches, old, strict=True)]
            anchors = [anchor_logp(mb, logp, algorithm.anchor, version) for mb, logp in zip(micro_batches, old, strict=True)]
            micro_batches = [mb.with_anchor_logp(anchor) for mb, anchor in zip(micro_batches, anchors, strict=True)]
        anchored.append(micro_batches)
    measured = engine.reduce(gaps)
    raise_if_nonfinite(measured)
    del measured["min/nonfinite"]
    check_drift(measured, drift, version)
    if reference is not None:
        with engine.using(reference):
            anchored = [_with_reference(engine, micro_batches, temperature) for micro_batches in anchored]
    steps = []
    loss = partial(_policy_share, algorithm=algorithm)
    for micro_batches in anchored:
        steps.append(engine.train_step(micro_batches, loss, temperature))
    return merge_stats(steps) | measured


def _with_reference(engine: TrainerRank, micro_batches: list[MicroBatch], temperature: float) -> list[MicroBatch]:
    """The packs with the reference policy's log-probs, which only the last pipeline stage has. It chooses its experts itself."""
    logp = engine.logp([replace(mb, own_experts=None) for mb in micro_batches], temperature)
    if not logp:
        return micro_batches
    return [mb.with_reference_logp(of_pack) for mb, of_pack in zip(micro_batches, logp, strict=True)]


def supervise(engine: TrainerRank, batch: list[MicroBatch]) -> dict[str, float]:
    """One optimizer step of maximum likelihood on the unmasked labels."""

    def share(logp: Tensor, mb: MicroBatch, scan: Scan) -> tuple[Tensor, dict[str, Tensor]]:
        out = nll_loss(logp=logp, mask=mb.mask, cu_seqlens=mb.cu_seqlens, weights=mb.weights, scan=scan)
        return out.loss, out.stats

    return engine.train_step(engine.place(batch), share, 1.0)


def anchor_logp(mb: MicroBatch, old_logp: Tensor, anchor: str, version: int) -> Tensor:
    """Log-probs [T] that ratios are taken against; see `AlgorithmConfig.anchor`. `version` is the trainer's present one."""
    if anchor == "old":
        return old_logp
    if anchor == "rollout":
        return mb.rollout_logp
    return torch.where(mb.versions == version, old_logp, mb.rollout_logp)


def _policy_share(logp: Tensor, mb: MicroBatch, scan: Scan, *, algorithm: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    out = policy_loss(
        algorithm.objective,
        logp=logp,
        old_logp=mb.old_logp,
        advantages=mb.advantages,
        mask=mb.mask,
        cu_seqlens=mb.cu_seqlens,
        rollout_logp=mb.rollout_logp,
        weights=mb.weights,
        correction=algorithm.correction,
        restarts=mb.restarts if algorithm.restart_at_version else None,
        sequence_ids=mb.sequence_ids,
        support=support_of(mb, logp),
        scan=scan,
    )
    if algorithm.reference is None:
        return out.loss, out.stats
    penalty = reference_penalty(
        algorithm.reference.estimator,
        logp=logp,
        reference_logp=mb.reference_logp,
        mask=mb.mask,
        cu_seqlens=mb.cu_seqlens,
        weights=mb.weights,
        scan=scan,
    )
    return out.loss + algorithm.reference.coeff * penalty.loss, out.stats | penalty.stats


def support_of(mb: MicroBatch, logp: Tensor) -> Support | None:
    """Both policies at the sampling policy's likeliest words and, where it is none of them, the sampled one: [T, K + 1].

    None where the run does not collect such words.
    """
    if mb.support_ids is None:
        return None
    unused = mb.support_logp == -torch.inf
    among = ((mb.support_ids == mb.labels.unsqueeze(-1)) & ~unused).any(-1)
    sampled = [torch.where(among, -torch.inf, of.detach()).unsqueeze(-1) for of in (logp, mb.rollout_logp)]
    policy = torch.where(unused, -torch.inf, mb.policy_support_logp)
    return Support(torch.cat([policy, sampled[0]], -1), torch.cat([mb.support_logp, sampled[1]], -1))


def drift_stats(mb: MicroBatch, logp: Tensor, scan: Scan, version: int) -> dict[str, Tensor]:
    """Distance of trainer and engine on the tokens that `version` itself sampled, in all and by position."""
    counted = mb.mask & (mb.versions == version)
    gap = torch.where(counted, (logp - mb.rollout_logp).abs(), 0.0)
    (count,) = scan.run([Channel(mb.mask)], mb.cu_seqlens)
    position = count.values.clamp(min=1)
    bins = position_bin(position)
    by_bin = gap.new_zeros(POSITION_BINS).index_add_(0, bins, gap)
    count_by_bin = gap.new_zeros(POSITION_BINS).index_add_(0, bins, counted.to(gap.dtype))
    stats = {"sum/drift_tokens": counted.sum().float(), "sum/drift": gap.sum(), "max/drift": gap.max()}
    stats |= nonfinite_stats(~torch.isfinite(logp) & mb.mask, position, mb.sequence_ids, mb.cu_seqlens, scan)
    for b in range(POSITION_BINS):
        stats[f"sum/drift_bin_{b}"] = by_bin[b]
        stats[f"sum/drift_tokens_bin_{b}"] = count_by_bin[b]
    return stats


def check_drift(measured: dict[str, float], bound: DriftConfig, version: int) -> None:
    """Raise MismatchError when a bound is passed; a NaN passes every bound."""
    tokens = max(measured.get("sum/drift_tokens", 0.0), 1.0)
    found = {"max": measured.get("max/drift", 0.0), "mean": measured.get("sum/drift", 0.0) / tokens}
    for kind, value in found.items():
        limit = getattr(bound, kind)
        if limit is not None and not value <= limit:
            raise MismatchError(
                f"trainer and inference engine disagree about the log-probs of policy version {version}: {kind} |difference| is "
                f"{value:.3g}, drift.{kind} allows {limit:.3g} ({tokens:.0f} tokens). Either the weights did not arrive, or the "
                f"two compute differently (dtype, kernels); raise drift.{kind} only if you know which."
            )


def merge_stats(steps: Iterable[dict[str, float]]) -> dict[str, float]:
    """Statistics of several optimizer steps as one: sums add, extremes combine, plain keys average."""
    gathered: dict[str, list[float]] = {}
    for stats in steps:
        for key, value in stats.items():
            gathered.setdefault(key, []).append(value)
    rules = {"sum": sum, "max": max, "min": min}
    return {k: rules.get(k.split("/")[0], lambda v: sum(v) / len(v))(values) for k, values in gathered.items()}
