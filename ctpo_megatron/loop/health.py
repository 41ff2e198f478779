"""The health panel of a training step: log-ratios, clipping and drift by position, effective sample size. See docs/health.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.algorithms.health import DECILES, POSITION_BINS
from ctpo_megatron.record.values import Mean, Sum, Value

Array = NDArray[np.float64]
STILL = 0.01  # of the fitted variance; below it are openings that the policy writes without a choice, and they obey no power law
ROUNDING = 1e-12  # a variance that is less of the mean square than this is what float64 left of equal numbers


def health_metrics(stats: Mapping[str, Value]) -> dict[str, float]:
    """The panel's numbers from the sums of `algorithms.health`, the ratios and the drift; those without tokens are left out."""
    metrics = _by_position(stats) | _by_decile(stats) | _drift_by_position(stats)
    for name, of in (("effective_sample_size", "ratio"), ("correction_sample_size", "correction")):
        mean, square = stats.get(of), stats.get(f"{of}_sq")
        if isinstance(mean, Mean) and isinstance(square, Mean):
            size = effective_sample_size(float(mean.total), float(square.total), float(mean.weight))
            metrics[f"health/{name}"] = size
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def health_histograms(metrics: Mapping[str, float]) -> dict[str, tuple[list[float], list[float]]]:
    """The panel as histograms: name to borders [n+1] and heights [n]. Positions are on the scale log2(t)."""
    of_decile = [metrics.get(f"health/clip_fraction/decile_{k}", 0.0) for k in range(DECILES)]
    histograms = {"health/clip_fraction": ([k / DECILES for k in range(DECILES + 1)], of_decile)}
    sources = {name: f"health/{name}" for name in ("log_ratio_std", "log_ratio_fit")} | {"drift": "drift"}
    for name, source in sources.items():
        heights = [metrics.get(f"{source}/from_token_{2**b}", 0.0) for b in range(POSITION_BINS)]
        histograms[f"health/{name}"] = ([float(b) for b in range(POSITION_BINS + 1)], heights)
    return histograms


def effective_sample_size(total: float, squares: float, count: float) -> float:
    """Kish's (sum w)^2 / (n sum w^2) of n weights: 1 where all are equal, 1/n where one is all; NaN of none."""
    return total * total / (count * squares) if count * squares > 0 else math.nan


def root_law(tokens: Array, position: Array, variance: Array) -> float:
    """sigma of Var(S_t) = sigma^2 t, from bins with `tokens`, mean `position` and `variance` of S: [B] each; NaN of no bin.

    Least squares of Var / t, each bin weighted by its tokens: the spread of a variance grows like t itself.
    """
    return math.sqrt(float((tokens * variance / position).sum() / tokens.sum())) if tokens.size else math.nan


def growth_exponent(tokens: Array, position: Array, variance: Array) -> float:
    """Slope of log std against log t, arguments as in `root_law`: 0.5 where log-ratios add up independently; NaN of one bin.

    A bin weighs as much as there are trajectories in it, tokens / position: a trajectory's tokens do not tell independently.
    Bins whose variance is less than STILL times the root law's are left out.
    """
    moved = variance > STILL * root_law(tokens, position, variance) ** 2 * position
    if moved.sum() < 2:
        return math.nan
    x, y, weight = np.log(position[moved]), 0.5 * np.log(variance[moved]), tokens[moved] / position[moved]
    x = x - (weight * x).sum() / weight.sum()
    return float((weight * x * y).sum() / (weight * x * x).sum())


def _by_position(stats: Mapping[str, Value]) -> dict[str, float]:
    sums = np.stack([_vector(stats, name, POSITION_BINS) for name in ("tokens", "position", "log_ratio", "log_ratio_sq")])
    bins = np.flatnonzero((sums[0] > 0) & np.isfinite(sums).all(0))
    tokens = sums[0, bins]
    position, mean, square = sums[1:, bins] / tokens
    # about the bin's mean: the mean itself drifts like t (docs/theory.md, equation 5) and would outgrow the root
    variance = square - mean * mean
    variance = np.where(variance > ROUNDING * square, variance, 0.0)
    sigma = root_law(tokens, position, variance)
    metrics = {"health/log_ratio_sigma": sigma, "health/log_ratio_growth": growth_exponent(tokens, position, variance)}
    for i, b in enumerate(bins):
        metrics[f"health/log_ratio_mean/from_token_{2**b}"] = float(mean[i])
        metrics[f"health/log_ratio_std/from_token_{2**b}"] = math.sqrt(variance[i])
        metrics[f"health/log_ratio_fit/from_token_{2**b}"] = sigma * math.sqrt(position[i])
    return metrics


def _by_decile(stats: Mapping[str, Value]) -> dict[str, float]:
    tokens, clipped = _vector(stats, "decile_tokens", DECILES), _vector(stats, "decile_clipped", DECILES)
    return {f"health/clip_fraction/decile_{k}": float(clipped[k] / tokens[k]) for k in np.flatnonzero(tokens > 0)}


def _drift_by_position(stats: Mapping[str, Value]) -> dict[str, float]:
    drift = stats.get("drift/from_token", Mean(np.zeros(POSITION_BINS), np.zeros(POSITION_BINS)))
    if not isinstance(drift, Mean):
        raise TypeError(f"drift/from_token is a {type(drift).__name__} where a mean is needed")
    mean = np.asarray(drift.result())
    return {f"drift/from_token_{2**b}": float(mean[b]) for b in np.flatnonzero(drift.weight)}


def _vector(stats: Mapping[str, Value], name: str, size: int) -> Array:
    """One of the panel's sums by range or decile: [size]; zeros where the loss does not report it."""
    value = stats.get(f"health/{name}", Sum(np.zeros(size)))
    return np.asarray(value.result(), dtype=np.float64)
