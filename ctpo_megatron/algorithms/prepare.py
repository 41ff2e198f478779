"""From streams to what a method's loss is given: masks applied, statistics scanned, all in one call of the scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms.correction import correction_channel, mismatch
from ctpo_megatron.algorithms.operators import MAX_ABS
from ctpo_megatron.algorithms.recipe import Recipe
from ctpo_megatron.algorithms.scan import Channel, Scan, Scanned
from ctpo_megatron.algorithms.tokens import Given, Quantile, Statistic, Support, Tokens


class Streams(NamedTuple):
    """A micro-batch as it comes, or this rank's shard of it. Anything may stand where `mask` is False."""

    logp: Tensor  # [T] with grad
    old_logp: Tensor  # [T]
    rollout_logp: Tensor | None  # [T]
    anchor: Tensor  # [T], the one of the two that the objective's ratio is taken against
    advantages: Tensor  # [T]
    mask: Tensor  # [T] bool
    cu_seqlens: Tensor  # [N+1]
    restarts: Tensor | None  # [T] bool
    support: Support | None


class Prepared(NamedTuple):
    """Tokens, and what was learned about whole sequences on the way."""

    tokens: Tokens
    place: Tensor  # [T] like tokens.position, but not begun anew at restarts
    lengths: Tensor  # [N] float64, policy tokens of each whole sequence
    signs: Tensor | None  # [N], sum of the signs of a sequence's advantages, for balanced aggregation
    mismatch: Tensor | None  # [T], of a correction
    scanned_mismatch: Tensor | None  # [T], of a correction above token level
    also: list[Scanned]  # of channels that the objective knows nothing of


def prepare(recipe: Recipe, streams: Streams, scan: Scan, also: Sequence[Channel] = ()) -> Prepared:
    """Scan everything that the recipe needs, and `also`, at once: one collective under context parallelism, one more for
    quantiles."""
    logp, anchor = streams.logp.detach(), streams.anchor.detach().to(streams.logp.dtype)
    log_ratio = torch.where(streams.mask, logp - anchor, 0.0).clamp_(-MAX_ABS, MAX_ABS)
    given = Given(logp, anchor, streams.advantages, streams.mask, log_ratio, streams.support)
    statistics = recipe.method.statistics(given, **recipe.options)
    gap, correcting = None, None
    if recipe.correction is not None:
        if streams.rollout_logp is None:
            raise ValueError("a correction needs rollout_logp, the sampling engine's log-probs")
        gap = mismatch(streams.old_logp, streams.rollout_logp, streams.mask).to(logp.dtype)
        correcting = correction_channel(recipe.correction.level, gap)
    asked = channels(given, statistics if correcting is None else {**statistics, "/mismatch": correcting}, streams.restarts)
    if recipe.aggregation == "balanced":
        asked["/signs"] = Channel(torch.sign(given.advantages), reach="sequence")
    asked |= {f"/also/{number}": channel for number, channel in enumerate(also)}
    asked = dict(sorted(asked.items(), key=lambda item: item[1].reach != "sequence"))  # these keep nothing while others run
    scanned = dict(zip(asked, scan.run(list(asked.values()), streams.cu_seqlens), strict=True))
    place = scanned.get("/place", scanned["/position"])
    dtype, count = logp.dtype, logp.numel()

    def spread(per_sequence: Tensor) -> Tensor:
        return scan.per_token(per_sequence.to(dtype), streams.cu_seqlens, count)

    def of_token(name: str) -> Tensor:
        return spread(scanned[name].totals) if asked[name].reach == "sequence" else scanned[name].values

    def value(name: str, statistic: Statistic) -> Tensor:
        if isinstance(statistic, Channel):
            return of_token(name)
        if isinstance(statistic, Quantile):
            return spread(scan.quantile(statistic.values, streams.mask, streams.cu_seqlens, statistic.q))
        return statistic

    tokens = Tokens(
        logp=streams.logp,
        anchor=streams.anchor,
        advantages=streams.advantages,
        mask=streams.mask,
        prefix_sum=scanned["/prefix"].values,
        position=scanned["/position"].values,
        length=spread(place.totals.clamp(min=1)),
        statistics={name: value(name, statistic) for name, statistic in statistics.items()},
    )
    signs = scanned["/signs"].totals if "/signs" in scanned else None
    others = [scanned[f"/also/{number}"] for number in range(len(also))]
    correcting_with = of_token("/mismatch") if "/mismatch" in asked else None
    return Prepared(tokens, place.values, place.totals, signs, gap, correcting_with, others)


def channels(given: Given, statistics: Mapping[str, Statistic], restarts: Tensor | None) -> dict[str, Channel]:
    """What every objective needs, and the channels among `statistics`; those that look back begin anew at `restarts`."""
    asked = {"/position": Channel(given.mask), "/prefix": Channel(given.log_ratio)}
    asked |= {name: statistic for name, statistic in statistics.items() if isinstance(statistic, Channel)}
    if restarts is None:
        return asked
    restarted = {
        name: channel._replace(restarts=restarts) if channel.reach in ("prefix", "before") else channel
        for name, channel in asked.items()
    }
    return restarted | {"/place": Channel(given.mask)}
