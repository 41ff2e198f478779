"""The policy before an update: the log-probs that ratios are taken against, and their distance from the engine's.

The first optimizer step of an update trains the very weights that are the old policy, so its own forward pass has the old
policy's log-probs, and no pass is made for them. Those of the later optimizer steps are found before the first is applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Channel, Scan, Stats, Weighted
from ctpo_megatron.algorithms.health import POSITION_BINS, position_bin
from ctpo_megatron.algorithms.statistics import nonfinite_stats
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.errors import MismatchError
from ctpo_megatron.mcore.kept_tokens import KeptTokens
from ctpo_megatron.record.values import Mean, Value, scalar

if TYPE_CHECKING:  # megatron may be imported only after prepare_host
    from ctpo_megatron.mcore.step import LossFn

DRIFT = ("drift/mean", "drift/from_token", "drift/max")


class OldPolicy:
    """That of one update by the trainer's policy `version`. `kept`: gets each token's distance from the engine."""

    def __init__(self, scan: Scan, anchor: str, version: int, kept: KeptTokens | None) -> None:
        self._scan, self._anchor, self._version, self._kept = scan, anchor, version, kept

    def known(self, shards: list[MicroBatch]) -> list[MicroBatch]:
        """The shards with what anchors are known without a pass: the engine's log-probs, where all ratios are against them."""
        if self._anchor != "rollout":
            return shards
        return [mb.with_streams(anchor_logp=mb.tokens.rollout_logp) for mb in shards]

    def anchored(
        self, number: int, placed: list[MicroBatch], shards: list[MicroBatch], old: list[Tensor]
    ) -> tuple[list[MicroBatch], list[Stats]]:
        """The shards of optimizer step `number` with their anchors, and their distance from the engine.

        `placed` are the shards on the device, `old` [T_local] their log-probs, of which only the last pipeline stage has any.
        """
        if not old:
            return shards, []
        if self._kept is not None:
            note = self._kept.before(number, placed)
            for mb, logp in zip(placed, old, strict=True):
                note(mb, logp - mb.tokens.rollout_logp)
        gaps = [drift_stats(mb, logp, self._scan, self._version) for mb, logp in zip(placed, old, strict=True)]
        anchors = [anchor_logp(mb, logp, self._anchor, self._version) for mb, logp in zip(placed, old, strict=True)]
        return [mb.with_streams(anchor_logp=each) for mb, each in zip(shards, anchors, strict=True)], gaps

    def share(self, loss: LossFn, placed: list[MicroBatch], logp: Tensor, mb: MicroBatch, scan: Scan) -> tuple[Tensor, Stats]:
        """`loss` of a micro-batch of the first optimizer step, whose own log-probs are the old policy's.

        `placed`: all micro-batches of the step. Its statistics come with the distance from the engine.
        """
        old = logp.detach()
        if self._kept is not None:
            self._kept.before(0, placed)(mb, old - mb.tokens.rollout_logp)
        anchored = mb.with_streams(anchor_logp=anchor_logp(mb, old, self._anchor, self._version))
        share, stats = loss(logp, anchored, scan)
        return share, drift_stats(mb, old, scan, self._version) | stats


def anchor_logp(mb: MicroBatch, old_logp: Tensor, anchor: str, version: int) -> Tensor:
    """Log-probs [T] that ratios are taken against; see `AlgorithmConfig.anchor`. `version` is the trainer's present one."""
    tokens = mb.tokens
    if anchor == "old":
        return old_logp
    if anchor == "rollout":
        return tokens.rollout_logp
    return torch.where(tokens.versions == version, old_logp, tokens.rollout_logp)


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
