"""From log-probs to one scalar: the objective's per-token loss, aggregated over packed sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ctpo_megatron.algorithms.aggregation import sequence_weights
from ctpo_megatron.algorithms.fused import applies, fused_loss
from ctpo_megatron.algorithms.per_token import per_token_loss
from ctpo_megatron.algorithms.prepare import Streams, prepare
from ctpo_megatron.algorithms.recipe import Recipe, make_recipe
from ctpo_megatron.algorithms.scan import Channel, LocalScan, Scan, Scanned
from ctpo_megatron.algorithms.statistics import Stats, input_stats
from ctpo_megatron.algorithms.tokens import Seen, Support
from ctpo_megatron.config.objectives import Aggregation, Correction, DelightConfig, Objective


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`."""

    loss: Tensor  # scalar with grad; under context parallelism this rank's share, to be summed over the group
    token_loss: Tensor  # [T] with grad, before aggregation; zero where masked
    stats: Stats  # on the device
    also: Sequence[Scanned] = ()  # of the channels that the caller asked for besides


def policy_loss(
    objective: Mapping[str, Any] | Objective,
    *,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    rollout_logp: Tensor | None = None,
    aggregation: str | Mapping[str, Any] | Aggregation = "sequence-mean",
    normalizer: float | None = None,
    groups: Tensor | None = None,
    weights: Tensor | None = None,
    correction: Mapping[str, Any] | Correction | None = None,
    delight: Mapping[str, Any] | DelightConfig | None = None,
    restarts: Tensor | None = None,
    support: Support | None = None,
    sequence_ids: Tensor | None = None,
    scan: Scan | None = None,
) -> PolicyLoss:
    """The surrogate loss of packed, label-aligned sequences. Never waits for the device.

    Args:
        objective: a config or a mapping with its field names, e.g. `{"type": "ctpo"}`.
        logp, old_logp, advantages, mask: [T] streams; `mask` is True on tokens the policy wrote, and nothing else counts.
        cu_seqlens: [N+1] int, borders of the WHOLE sequences, also when the streams are context-parallel shards.
        rollout_logp: [T], log-probs of the engine that sampled. dppo, cppo, trm, drpo, kpop and corrections need it; for
            the others it only has to be finite.
        aggregation: token-mean, sequence-mean, sequence-sum, balanced, or {"type": "constant", "tokens": n}; see `aggregation`.
        normalizer: the aggregation's divisor; None: counted here, where fully masked sequences are left out.
        groups: [N] int, the prompt of each sequence, for `balanced`.
        weights: [N], the weight of a token of each sequence, in place of aggregation, normalizer and groups.
        correction: of the mismatch between old_logp and rollout_logp, e.g. `{"type": "truncate", "level": "prefix"}`.
        delight: weights of arXiv 2603.14608 on the loss, e.g. `{"eta": 1.0}`.
        restarts: [T] bool; at these tokens prefix statistics and positions begin anew (a new policy version wrote from here).
        support: the top-k log-probs that the top-k divergences of dppo, cppo and trm and the top-k bands of ctpo look at.
        sequence_ids: [N] int, what to call the sequences when a log-prob is not finite; None: 0, 1, 2 ...
        scan: None for whole sequences; a `ContextParallelScan` for shards.

    Raises pydantic.ValidationError for an unknown objective or option, ValueError for a missing input. A log-prob that is not
    finite is found by `raise_if_nonfinite(stats)`.
    """
    recipe = make_recipe(objective, aggregation, correction, has_rollout=rollout_logp is not None, delight=delight)
    return recipe_loss(
        recipe,
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        rollout_logp=rollout_logp,
        normalizer=normalizer,
        groups=groups,
        weights=weights,
        restarts=restarts,
        support=support,
        sequence_ids=sequence_ids,
        scan=scan,
    )


def recipe_loss(
    recipe: Recipe,
    *,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    rollout_logp: Tensor | None = None,
    normalizer: float | None = None,
    groups: Tensor | None = None,
    weights: Tensor | None = None,
    restarts: Tensor | None = None,
    support: Support | None = None,
    sequence_ids: Tensor | None = None,
    scan: Scan | None = None,
    seen: list[Seen] | None = None,
    also: Sequence[Channel] = (),
) -> PolicyLoss:
    """`policy_loss` of a recipe that was made before, for callers with many micro-batches; arguments and errors as there.

    `seen`: gets what became of the tokens, in parts that follow one another. `also`: what else to scan, in the same collective.
    """
    scan = scan or LocalScan()
    anchor = rollout_logp if recipe.anchor == "rollout" else old_logp
    if anchor is None:
        raise ValueError("the objective takes its ratio against the rollout policy; it needs rollout_logp")
    streams = Streams(logp, old_logp, rollout_logp, anchor, advantages, mask, cu_seqlens, restarts, support)
    signs: Tensor | None
    if applies(recipe, streams, scan):
        token_loss, stats, lengths, signs = fused_loss(recipe, streams, sequence_ids, seen)
        scanned = scan.run(also, cu_seqlens) if also else []
    else:
        ready = prepare(recipe, streams, scan, also)
        token_loss, stats = per_token_loss(recipe, ready, seen)
        stats |= input_stats(streams, ready, sequence_ids, scan)
        lengths, signs, scanned = ready.lengths, ready.signs, ready.also
    if weights is None:
        weights = sequence_weights(
            recipe.aggregation, lengths, normalizer=normalizer, constant=recipe.constant, groups=groups, signs=signs
        )
    per_token = scan.per_token(weights.to(token_loss), cu_seqlens, token_loss.numel())
    return PolicyLoss((token_loss * per_token).sum(), token_loss, stats, scanned)
