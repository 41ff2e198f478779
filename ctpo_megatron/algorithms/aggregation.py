"""How per-token losses become one number: every aggregation is a weight for all tokens of a sequence.

So a batch may be cut into micro-batches and over ranks in any way, also through a group: weights are found once, from the whole
batch, and the loss is the sum of weighted token losses, wherever they are.

    token-mean     1 / policy tokens
    sequence-mean  1 / (tokens of the sequence * sequences)             mean over sequences of token means
    sequence-sum   1 / sequences                                        mean over sequences of token sums
    constant       1 / (a fixed number of tokens * sequences)           Dr. GRPO, arXiv 2503.20783
    balanced       (S / G) / tokens of S's sequences / groups           Balanced Aggregation, arXiv 2605.04077: of a group's G
                   sequences, S have the same sign of the advantage

Sequences without a policy token count nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_weights(
    aggregation: str,
    lengths: Tensor,
    *,
    normalizer: float | None = None,
    constant: float = 1.0,
    groups: Tensor | None = None,
    signs: Tensor | None = None,
) -> Tensor:
    """Weight of a token in each sequence: [N] float64.

    Args:
        lengths: [N], policy tokens of each whole sequence.
        normalizer: the divisor, where the sequences at hand are not all of the batch: its policy tokens for token-mean, its
            groups for balanced, else its sequences. None: counted here.
        constant: tokens that `constant` divides a sequence's sum by.
        groups, signs: [N], the group of each sequence and the sign of its advantage, for balanced.
    """
    lengths = lengths.to(torch.float64)
    filled = lengths > 0
    if aggregation == "token-mean":
        shape, counted = torch.ones_like(lengths), lengths.sum()
    elif aggregation == "balanced":
        if groups is None or signs is None:
            raise ValueError("aggregation 'balanced' needs `groups`: the group of each sequence, [N]")
        shape, counted = _balanced(lengths, groups.to(lengths.device), signs)
    else:
        shape = {"sequence-mean": 1 / lengths.clamp(min=1), "sequence-sum": torch.ones_like(lengths)}.get(
            aggregation, torch.full_like(lengths, 1 / constant)
        )
        counted = filled.sum()
    divisor = counted.clamp(min=1) if normalizer is None else normalizer
    return torch.where(filled, shape / divisor, 0.0)


def _balanced(lengths: Tensor, groups: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Weights before the division by the number of groups, and that number."""
    filled = (lengths > 0).to(torch.float64)
    group = _labels(groups)
    side = 3 * group + torch.sign(signs).to(torch.int64) + 1
    in_group, on_side, tokens = _sum_by(group, filled), _sum_by(side, filled), _sum_by(side, lengths)
    shape = on_side / in_group.clamp(min=1) / tokens.clamp(min=1)
    return shape, (filled / in_group.clamp(min=1)).sum().round()


def _labels(keys: Tensor) -> Tensor:
    """Equal keys [N] get equal numbers from 0; unlike `torch.unique`, without a host sync."""
    ordered, order = keys.sort()
    changes = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).to(torch.int64), (1, 0))
    return torch.empty_like(order).scatter_(0, order, changes.cumsum(0))


def _sum_by(labels: Tensor, values: Tensor) -> Tensor:
    """For each element the sum of `values` over all with its label: [N]."""
    return values.new_zeros(3 * labels.numel()).index_add_(0, labels, values)[labels]
