"""Where `policy_loss` is computed in one compiled pass instead of by torch, and that pass's results as torch's are.

The pass (`kernels/cpu`) takes whole sequences on a CPU whose numbers are all float32, from `FEWEST` tokens on: below
that the import and the start of the compiled code, once in a process, take longer than they save. It knows the objectives in
`JUDGES`. Everything else goes to torch: another device, context parallelism, sums that are not exact, top-k divergences, `cppo`
with an adaptive budget (an order statistic), `ctpo` with a measured band, delight, an objective without a judge.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ctpo_megatron.algorithms.density import FINEST, edges
from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.algorithms.operators import check_length
from ctpo_megatron.algorithms.per_token import linearised
from ctpo_megatron.algorithms.prepare import Streams
from ctpo_megatron.algorithms.recipe import Recipe
from ctpo_megatron.algorithms.scan import LocalScan, Scan
from ctpo_megatron.algorithms.statistics import NONFINITE, POSITIONS, Stats, Weighted
from ctpo_megatron.algorithms.tokens import Method, Seen
from ctpo_megatron.kernels.numbers import DECILES, POSITION_BINS

FEWEST = 2**17  # tokens
MEASURES = ("k2", "k3", "binary_tv", "binary_kl")
LEVELS = (None, "token", "prefix", "sequence", "geometric")

Options = Mapping[str, Any]


def _bound(value: float | None) -> float:
    return math.inf if value is None else value


def _around_one(options: Options, *more: float) -> tuple[float, ...]:
    return (1 - options["clip_low"], 1 + options["clip_high"], *more)


# the numbers that a judge gets, in its order; judges are numbered as in `kernels.cpu.judges`
_NUMBERS: dict[str, Callable[[Options], tuple[float, ...]]] = {
    "ctpo": lambda o: (float(o["ratio"] == "geomean"), o["clip_low"], o["clip_high"], _bound(o["dual_clip"]), o["power"]),
    "grpo": lambda o: _around_one(o, _bound(o["dual_clip"])),
    "gspo": lambda o: _around_one(o, math.inf),
    "sequence": lambda o: _around_one(o, math.inf),
    "sapo": lambda o: (o["tau_positive"], o["tau_negative"]),
    "cispo": lambda o: _around_one(o),
    "gmpo": lambda o: (o["clip_low"], o["clip_high"]),
    "minpro": lambda o: _around_one(o, math.inf, float(o["form"] == "ppo")),
    "dppo": lambda o: (o["delta"], _bound(o["ratio_cap"])),
    "cppo": lambda o: (o["delta"], o["budget"], o["weight_min"]),
    "trm": lambda o: (_bound(o["max_divergence"]), _bound(o["mean_divergence"])),
}
JUDGES: dict[Method, int] = {OBJECTIVES[name]: place for place, name in enumerate(_NUMBERS)}


def applies(recipe: Recipe, streams: Streams, scan: Scan) -> bool:
    """Whether the pass computes this recipe on these streams."""
    logp = streams.logp
    floats = [logp, streams.old_logp, streams.advantages, *([] if streams.rollout_logp is None else [streams.rollout_logp])]
    return (
        logp.numel() >= FEWEST
        and type(scan) is LocalScan
        and scan.exact
        and recipe.method in JUDGES
        and recipe.delight is None
        and recipe.options.get("band", "position") == "position"
        and recipe.options.get("divergence", MEASURES[0]) in MEASURES
        and not recipe.options.get("adaptive_budget", False)
        and all(isinstance(each, torch.Tensor) and each.device.type == "cpu" and each.dtype == logp.dtype for each in floats)
        and type(logp) in (torch.Tensor, torch.nn.Parameter)
        and logp.dtype == torch.float32
        and importlib.util.find_spec("numba") is not None
    )


def fused_loss(
    recipe: Recipe, streams: Streams, sequence_ids: Tensor | None, seen: list[Seen] | None
) -> tuple[Tensor, Stats, Tensor, Tensor]:
    """Per-token loss [T] with grad, its statistics, and of the sequences [N] how many tokens count and the sum of signs.

    What `prepare`, `per_token_loss` and `input_stats` find, for what `applies` lets through.
    """
    from ctpo_megatron.kernels.cpu import launch

    check_length(streams.logp.numel())
    if recipe.correction is not None and streams.rollout_logp is None:
        raise ValueError("a correction needs rollout_logp, the sampling engine's log-probs")
    rollout = streams.old_logp if streams.rollout_logp is None else streams.rollout_logp
    found = launch.judge(
        _how(recipe),
        streams=(streams.logp, streams.anchor, streams.old_logp, rollout, streams.advantages),
        mask=streams.mask,
        cu_seqlens=streams.cu_seqlens,
        restarts=streams.restarts,
        edges=[(tuple(edges(finest)), finest) for finest in FINEST],
        record=seen is not None,
    )
    if seen is not None:
        seen.append(Seen.of_bits(found.held, found.fates))
    stats = _stats(found, recipe, sequence_ids)
    return linearised(streams.logp, found.value, found.slope), stats, found.lengths, found.signs


def _how(recipe: Recipe) -> Any:
    from ctpo_megatron.kernels.cpu.launch import How

    kind, options, correction = JUDGES[recipe.method], recipe.options, recipe.correction
    numbers = list(_NUMBERS.values())[kind](options)
    measure = MEASURES.index(options["divergence"]) if "divergence" in options else 0
    if correction is None:
        return How(kind, numbers, measure, density=recipe.density)
    level, manner = LEVELS.index(correction.level), int(correction.type != "truncate")
    return How(kind, numbers, measure, level, manner, correction.low, correction.high, recipe.density)


def _stats(found: Any, recipe: Recipe, sequence_ids: Tensor | None) -> Stats:
    """The pass's sums under the names that `statistics`, `health`, `density` and `per_token` give them."""
    from ctpo_megatron.kernels.cpu import tokens as k

    sums, counts = found.sums, found.counts.double()
    number = counts[k.TOKENS]
    rows = {"clip_high": k.CLIP_HIGH, "clip_low": k.CLIP_LOW, "clip_dual": k.CLIP_DUAL, "clip_fraction": k.CLIPPED}
    totals = {name: counts[row] for name, row in rows.items()}
    totals |= {
        "ratio": sums[k.RATIO],
        "ratio_sq": sums[k.RATIO_SQ],
        "kl_old": sums[k.KL_OLD],
        "log_ratio_sq": sums[k.LOG_RATIO_SQ],
    }
    maxima = {"ratio_max": sums[k.RATIO_MAX]}
    if recipe.correction is not None:
        totals |= {"correction": sums[k.WEIGHT], "correction_sq": sums[k.WEIGHT_SQ], "correction_zero": counts[k.WEIGHT_ZERO]}
        totals |= {"correction_before": sums[k.WEIGHT_BEFORE], "correction_log": sums[k.WEIGHT_LOG]}
        maxima |= {"correction_max": sums[k.WEIGHT_MAX], "correction_before_max": sums[k.WEIGHT_BEFORE_MAX]}
    bins = sums[k.BY_POSITION : k.BY_TENTH].view(5, POSITION_BINS)
    unclipped, cut = sums[k.BY_TENTH :].view(2, DECILES)
    names = ("tokens", "position", "log_ratio", "log_ratio_sq", "clipped")
    vectors = {f"health/{name}": row for name, row in zip(names, bins, strict=True)}
    vectors |= {"health/decile_tokens": unclipped + cut, "health/decile_clipped": cut}
    vectors |= {"health/density": counts[k.BY_BUCKET :]} if recipe.density else {}
    sequence, place = counts[k.BAD], counts[k.BAD_PLACE]
    if sequence_ids is not None and len(sequence_ids):
        sequence = sequence_ids[found.counts[k.BAD].clamp(min=0)].double()
    bad = torch.where(counts[k.BAD] < 0, math.inf, sequence * POSITIONS + place)
    return Stats(
        sums={"tokens": number} | vectors,
        means={name: Weighted(total, number) for name, total in totals.items()},
        maxima=maxima,
        minima={"ratio_min": sums[k.RATIO_MIN], NONFINITE: bad},
    )
