"""From log-probs to one scalar: the objective's per-token loss, aggregated over packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ctpo_megatron.algorithms.ctpo import ctpo_loss
from ctpo_megatron.algorithms.grpo import grpo_loss
from ctpo_megatron.algorithms.scan import LocalScan, Scan
from ctpo_megatron.algorithms.tokens import Stats, prepare
from ctpo_megatron.config.algorithm import Aggregation, Objective

OBJECTIVES = {"ctpo": ctpo_loss, "grpo": grpo_loss}
_objective = TypeAdapter(Objective)


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`."""

    loss: Tensor  # scalar with grad; under context parallelism this rank's share, to be summed over the group
    token_loss: Tensor  # [T], before aggregation; zero where masked
    stats: Stats  # on the device; keys start with sum/, max/ or min/: how they combine over ranks and micro-batches


def policy_loss(
    objective: Mapping[str, Any] | Objective,
    *,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    rollout_logp: Tensor | None = None,
    aggregation: Aggregation = "sequence-mean",
    normalizer: float | None = None,
    scan: Scan | None = None,
) -> PolicyLoss:
    """The surrogate loss of packed, label-aligned sequences.

    Args:
        objective: a config or a mapping with its field names, e.g. `{"type": "ctpo"}`.
        logp, old_logp, advantages, mask: [T] streams; `mask` is True on tokens the policy wrote.
        cu_seqlens: [N+1] int, borders of the WHOLE sequences, also when the streams are context-parallel shards.
        rollout_logp: [T], log-probs of the sampling engine; its distance to old_logp is reported.
        aggregation: token-mean, sequence-mean (mean over sequences of token means), sequence-sum (of token sums).
        normalizer: divisor of the sum: policy tokens for token-mean, else sequences. None: counted here, where fully masked
            sequences are left out.
        scan: None for whole sequences; a `ContextParallelScan` for shards.

    Raises pydantic.ValidationError for an unknown objective or option.
    """
    config = objective if not isinstance(objective, Mapping) else _objective.validate_python(objective)
    scan = scan or LocalScan()
    tokens, lengths = prepare(logp, old_logp, advantages, mask, cu_seqlens, scan)
    token_loss, stats = OBJECTIVES[config.type](tokens, **config.model_dump(exclude={"type"}))
    loss = aggregate(token_loss, tokens.sequence_length, lengths, aggregation, normalizer)
    if rollout_logp is not None:
        gap = torch.where(mask, (old_logp - rollout_logp).abs(), 0.0)
        stats |= {"sum/drift": gap.sum().float(), "max/drift": gap.max().float()}
    return PolicyLoss(loss, token_loss, stats)


def nll_loss(
    *, logp: Tensor, mask: Tensor, cu_seqlens: Tensor, normalizer: float | None = None, scan: Scan | None = None
) -> PolicyLoss:
    """Mean negative log-likelihood of the unmasked tokens, for supervised training. Arguments as in `policy_loss`."""
    scan = scan or LocalScan()
    token_loss = torch.where(mask, -logp, 0.0)
    sums = scan.prefix_sums(mask.to(token_loss.dtype).unsqueeze(0), cu_seqlens)
    lengths = sums.totals[0]
    loss = aggregate(token_loss, None, lengths, "token-mean", normalizer)
    stats = {"sum/tokens": mask.sum().float(), "sum/nll": token_loss.detach().sum().float()}
    return PolicyLoss(loss, token_loss, stats)


def aggregate(
    token_loss: Tensor, sequence_length: Tensor | None, lengths: Tensor, aggregation: Aggregation, normalizer: float | None
) -> Tensor:
    """This rank's share of the loss. `lengths` [N]: policy tokens of each whole sequence; `sequence_length` [T] likewise."""
    if normalizer is None:
        counted = lengths.sum() if aggregation == "token-mean" else (lengths > 0).sum()
        divisor = counted.clamp(min=1).to(token_loss.dtype)
    else:
        divisor = normalizer
    if aggregation == "sequence-mean":
        token_loss = token_loss / sequence_length
    return token_loss.sum() / divisor
