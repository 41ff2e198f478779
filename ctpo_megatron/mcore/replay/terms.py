"""The terms of the loss at single tokens, taken while a replay computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Channel, Scan
from ctpo_megatron.algorithms.operators import MAX_ABS
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore.replay.findings import TokenTerms
from ctpo_megatron.mcore.replay.probe import Rows

TOLD = 12  # tokens that a rank tells of one by one


@dataclass
class _Taken:
    """Streams of one micro-batch's loss, [T_local] each."""

    shard: MicroBatch
    rows: Rows
    logp: Tensor
    anchor: Tensor
    loss: Tensor
    weight: Tensor
    count: Tensor
    log_ratio_sum: Tensor
    gradient: Tensor = field(default_factory=lambda: torch.zeros(0))


class LossTerms:
    """Collects the terms of a rank's micro-batches. `scale`: what multiplies a share's gradient before it reaches log-probs."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._taken: list[_Taken] = []

    def take(self, shard: MicroBatch, rows: Rows, logp: Tensor, token_loss: Tensor, scan: Scan) -> None:
        """Note a micro-batch's log-probs and losses [T_local]; collective under context parallelism."""
        tokens, cu_seqlens = shard.tokens, shard.sequences.cu_seqlens
        mine = logp.detach()
        anchor = mine if tokens.anchor_logp is None else tokens.anchor_logp
        ratio = torch.where(tokens.mask, mine - anchor, 0.0).nan_to_num(0.0).clamp(-MAX_ABS, MAX_ABS)
        count, total = scan.run([Channel(tokens.mask), Channel(ratio)], cu_seqlens)
        weight = scan.per_token(shard.sequences.weights, cu_seqlens, mine.numel())
        taken = _Taken(shard, rows, mine, anchor, token_loss.detach(), weight, count.values, total.values)
        self._taken.append(taken)
        if logp.requires_grad:
            logp.register_hook(lambda gradient: setattr(taken, "gradient", gradient.detach() / self._scale))

    def bad_tokens(self) -> int:
        """How many of the policy's tokens have a term that is not finite."""
        return sum(int(_bad(taken).sum()) for taken in self._taken)

    def tokens(self) -> list[TokenTerms]:
        """Terms of the first bad tokens; where there are none, of those that weigh most in the loss."""
        bad = [(taken, _bad(taken)) for taken in self._taken]
        if any(bool(flags.any()) for _, flags in bad):
            found = [_terms(taken, int(at)) for taken, flags in bad for at in flags.nonzero().flatten()[: 4 * TOLD]]
            return sorted(found, key=lambda each: each.place)[:TOLD]
        found = []
        for taken in self._taken:
            heavy = torch.where(taken.shard.tokens.mask, (taken.loss * taken.weight).abs(), -1.0)
            places = heavy.argsort(descending=True)[:TOLD].tolist()
            found += [_terms(taken, at) for at in places if bool(taken.shard.tokens.mask[at])]
        return sorted(found, key=lambda each: -abs(each.loss * each.weight))[:TOLD]


def _bad(taken: _Taken) -> Tensor:
    tokens = taken.shard.tokens
    streams = [taken.logp, taken.anchor, tokens.rollout_logp, tokens.advantages, taken.loss, taken.weight]
    streams += [taken.gradient] if taken.gradient.numel() else []
    finite = torch.stack([torch.isfinite(stream) for stream in streams]).all(0)
    return tokens.mask & ~finite


def _terms(taken: _Taken, at: int) -> TokenTerms:
    tokens = taken.shard.tokens
    logp, anchor = float(taken.logp[at]), float(taken.anchor[at])
    return TokenTerms(
        place=taken.rows.place(at),
        policy_token=int(taken.count[at]),
        input_id=int(tokens.input_ids[at]),
        label_id=int(tokens.labels[at]),
        logp=logp,
        anchor_logp=anchor,
        rollout_logp=float(tokens.rollout_logp[at]),
        log_ratio=logp - anchor,
        log_ratio_sum=float(taken.log_ratio_sum[at]),
        advantage=float(tokens.advantages[at]),
        weight=float(taken.weight[at]),
        loss=float(taken.loss[at]),
        gradient=float(taken.gradient[at]) if taken.gradient.numel() else math.nan,
    )
