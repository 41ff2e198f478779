"""The critic in an update: values before it, the advantages that GAE makes of them, and the value loss of its optimizer steps.

Values are those of the policy that stands before the first optimizer step, found in the pass of its log-probs (`old_policy`).
Advantages and returns are made once and stay for all optimizer steps of the update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Scan, Stats
from ctpo_megatron.algorithms.advantages.group import EPS
from ctpo_megatron.algorithms.critic import gae, value_loss, value_stats
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.advantages import GaeAdvantage
from ctpo_megatron.config.critic import CriticConfig
from ctpo_megatron.mcore.reduction import once
from ctpo_megatron.record.values import Values, scalar

SQUARES = ("critic/return_sq", "critic/advantage_sq")


def estimated(
    placed: list[MicroBatch], shards: list[MicroBatch], values: list[Tensor], scan: Scan, config: GaeAdvantage
) -> tuple[list[MicroBatch], list[Stats]]:
    """The shards of an optimizer step with old values, returns and advantages, and statistics of these.

    `placed` are the shards on the device, `values` [T_local] those before the update; none before the last pipeline stage, which
    alone is given advantages.
    """
    if not values:
        return shards, []
    made, stats = [], []
    for mb, shard, old in zip(placed, shards, values, strict=True):
        tokens = mb.tokens
        found = gae(
            rewards=present(tokens.rewards, "rewards"),
            values=old,
            mask=tokens.mask,
            cu_seqlens=mb.sequences.cu_seqlens,
            gamma=config.gamma,
            lam=config.lam,
            scan=scan,
        )
        made.append(shard.with_streams(old_values=old, returns=found.returns, advantages=found.advantages))
        stats.append(_named(value_stats(values=old, returns=found.returns, advantages=found.advantages, mask=tokens.mask)))
    return made, stats


def whitened(sharded: list[list[MicroBatch]], measured: Values) -> list[list[MicroBatch]]:
    """The shards with advantages of mean 0 and variance 1 over the policy tokens of the whole update.

    `measured`: what the statistics of `estimated` were reduced to.
    """
    mean, deviation = scalar(measured["critic/advantage"]), _deviation(measured, "advantage")

    def white(mb: MicroBatch) -> MicroBatch:
        tokens = mb.tokens
        if tokens.returns is None:  # before the last pipeline stage
            return mb
        mask = tokens.mask.to(tokens.advantages.device)
        return mb.with_streams(advantages=torch.where(mask, (tokens.advantages - mean) / (deviation + EPS), 0.0))

    return [[white(mb) for mb in shards] for shards in sharded]


def explained(values: Values) -> Values:
    """The values with what their squares say in the place of these: the explained variance, and a standard deviation."""
    error, spread = _deviation(values, "advantage"), _deviation(values, "return")
    made = {
        "critic/explained_variance": 1.0 - (error / spread) ** 2 if spread > 0 else 0.0,
        "critic/advantage_std": error,
    }
    return {name: value for name, value in values.items() if name not in SQUARES} | once(made)


def _deviation(values: Values, name: str) -> float:
    square = scalar(values[f"critic/{name}_sq"]) - scalar(values[f"critic/{name}"]) ** 2
    return math.sqrt(max(square, 0.0))


def critic_share(mb: MicroBatch, scan: Scan, critic: CriticConfig) -> tuple[Tensor, Stats]:
    """This rank's share of the value loss of one micro-batch, times its coefficient."""
    tokens, sequences = mb.tokens, mb.sequences
    out = value_loss(
        values=present(tokens.values, "values"),
        old_values=present(tokens.old_values, "old_values"),
        returns=present(tokens.returns, "returns"),
        mask=tokens.mask,
        cu_seqlens=sequences.cu_seqlens,
        weights=sequences.weights,
        clip=critic.clip,
        scan=scan,
    )
    return critic.coeff * out.loss, _named(out.stats)


def _named(stats: Stats) -> Stats:
    return Stats(means={f"critic/{name}": mean for name, mean in stats.means.items()})


def present(stream: Tensor | None, name: str) -> Tensor:
    """A stream that the step needs. Raises ValueError where an earlier part of it did not add the stream."""
    if stream is None:
        raise ValueError(f"the micro-batch has no {name}")
    return stream
