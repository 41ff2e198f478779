"""Several runs beside one another: seeds of one configuration are pooled, configurations are told apart by what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ctpo_megatron.report.figures.curves import banded
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.parts.standing import standing
from ctpo_megatron.report.reading.ledgers import Band
from ctpo_megatron.report.reading.run import OWN, PLACES, Run, same_but_for_the_seed, settings

COMPARED = (
    ("reward/mean", "reward", "Reward", "mean reward of a step"),
    ("eval/accuracy", "accuracy", "Accuracy", "held-out accuracy"),
    ("train/entropy", "entropy", "Entropy", "nats by token"),
    ("rollout/response_tokens", "lengths", "Tokens of a trajectory", "tokens"),
    ("train/clip_fraction", "clipped", "Clipped tokens", "share"),
    ("health/log_ratio_sigma", "sigma", "σ of the fitted law", "nats by √token"),
    ("time/step", "step_time", "Seconds of a step", "seconds"),
)


@dataclass(frozen=True, slots=True)
class Pool:
    """Runs of one configuration that differ in their seeds."""

    label: str
    runs: tuple[Run, ...]

    def series(self, name: str) -> list[tuple[int, Band]]:
        """Returns the mean over the runs at each step that all of them have, from the smallest to the largest of them."""
        known = [dict(run.metrics.series(name)) for run in self.runs]
        known = [each for each in known if each]
        steps = sorted(set.intersection(*map(set, known))) if known else []
        values = {step: [each[step] for each in known] for step in steps}
        return [(step, Band(fmean(each), min(each), max(each), len(each))) for step, each in values.items()]


def pools(runs: Sequence[Run]) -> list[Pool]:
    """Returns the runs by their configuration. A run whose configuration is not known stands alone."""
    found: dict[Any, list[Run]] = {}
    for place, run in enumerate(runs):
        found.setdefault(same_but_for_the_seed(run) if run.config else place, []).append(run)
    return [Pool(_label(members), tuple(members)) for members in found.values()]


def _label(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].label
    return (
        f"{runs[0].name} ({len(runs)} seeds)" if len({run.name for run in runs}) == 1 else " + ".join(run.label for run in runs)
    )


def comparison(runs: Sequence[Run]) -> Part:
    """Returns the section that compares runs."""
    pooled = pools(runs)
    labels = [each.label for each in pooled]
    pooled = [
        Pool(each.label if labels.count(each.label) == 1 else f"{each.label} {place}", each.runs)
        for place, each in enumerate(pooled, 1)
    ]
    note = "Lines are means over seeds at the steps that all have; bands reach from the smallest to the largest seed."
    figures = [
        banded(
            id,
            title,
            unit,
            {each.label: values for each in pooled if (values := each.series(name))},
            note=note,
            dots="eval" in name,
        )
        for name, id, title, unit in COMPARED
    ]
    rows = [_row(pool, run) for pool in pooled for run in pool.runs]
    differing = differences([pool.runs[0] for pool in pooled], [pool.label for pool in pooled])
    numbers = {
        "runs": rows,
        "differences": differing,
        "pools": {pool.label: {name: _last(pool.series(name)) for name, *_ in COMPARED} for pool in pooled},
    }
    given: dict[str, Any] = {"rows": rows, "differences": differing, "labels": [pool.label for pool in pooled]}
    return part("comparison", "Comparison", prefix="", figures=figures, numbers=numbers, **given)


def differences(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the settings in which runs differ, with each run's value as text."""
    flat = [settings(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each if key not in OWN and key not in PLACES)
    found = []
    for key in keys:
        values = [repr(each[key]) if key in each else "–" for each in flat]
        if len(set(values)) > 1:
            found.append({"key": key, "values": dict(zip(labels, values, strict=True))})
    return found


def _row(pool: Pool, run: Run) -> dict[str, Any]:
    stands, metrics = standing(run), run.metrics
    accuracies = metrics.series("eval/accuracy")
    rewards = [value for _, value in metrics.series("reward/mean")]
    return {
        "pool": pool.label,
        "run": run.label,
        "seed": run.config.get("seed"),
        "state": stands.word,
        "step": stands.step,
        "reward_first": rewards[0] if rewards else None,
        "reward_last": rewards[-1] if rewards else None,
        "reward_mean": fmean(rewards) if rewards else None,
        "accuracy_first": accuracies[0][1] if accuracies else None,
        "accuracy_last": accuracies[-1][1] if accuracies else None,
        "goodput": None if run.goodput is None else run.goodput.total.goodput,
    }


def _last(series: Sequence[tuple[int, Band]]) -> Mapping[str, Any] | None:
    if not series:
        return None
    step, band = series[-1]
    return {"step": step, "mean": band.mean, "low": band.low, "high": band.high, "runs": band.count}
