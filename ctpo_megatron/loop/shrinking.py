"""An alarm for corrections whose weights shrink a batch. Pure: it is given metrics, and returns what is to be told."""

from __future__ import annotations

from collections.abc import Mapping

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.record.mismatch_events import WeightsShrunk

MEAN, SAMPLE_SIZE, LOG = "train/correction", "health/correction_sample_size", "train/correction_log"


class ShrinkingAlarm:
    """Judges a run step by step; a metric that stays below its bound is told once, and again after it has recovered."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        alarm = algorithm.correction_alarm
        self._limits = {MEAN: alarm.mean, SAMPLE_SIZE: alarm.sample_size}
        self._told: set[str] = set()
        self._advice = _advice(algorithm)

    def step(self, step: int, metrics: Mapping[str, float]) -> list[WeightsShrunk]:
        """Returns what step `step` shows, given its `metrics`; those of a run without a correction show nothing."""
        below = {name: metrics[name] for name, limit in self._limits.items() if metrics.get(name, limit) < limit}
        found = [
            WeightsShrunk(step, name, value, self._limits[name], metrics.get(LOG, 0.0), self._advice)
            for name, value in below.items()
            if name not in self._told
        ]
        self._told = set(below)
        return found


def _advice(algorithm: AlgorithmConfig) -> str:
    correction = algorithm.correction
    if correction is None:
        return ""
    if correction.level in ("prefix", "sequence"):
        return (
            f"Products over long trajectories do that (algorithm.correction.level={correction.level}): set "
            "algorithm.correction.level=geometric or token (docs/mismatch.md)."
        )
    if correction.type == "truncate":
        return "Trainer and engine are far apart: look at drift/mean, and at rollout/staleness_mean."
    return (
        f"Weights outside of [algorithm.correction.low, high] = [{correction.low:g}, {correction.high:g}] count as 0: widen the "
        "range, or set algorithm.correction.type=truncate; and look at drift/mean."
    )
