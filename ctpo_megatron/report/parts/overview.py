"""The first screen: what was run, where it stands, what was learned, and what most deserves a look."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ctpo_megatron.report.figures.curves import banded, curves
from ctpo_megatron.report.figures.figure import Figure
from ctpo_megatron.report.findings.finding import Finding
from ctpo_megatron.report.findings.rules import SHOWN, findings
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.parts.standing import Standing, standing
from ctpo_megatron.report.reading.ledgers import Band
from ctpo_megatron.report.reading.run import Run


def overview(run: Run, prefix: str, there: frozenset[str]) -> Part:
    """Returns the first screen of a run. `there`: ids of what the page has, which findings may link to."""
    stands, found = standing(run), findings(run)
    figures = [reward(run), accuracy(run)]
    known = there | {each.id for each in figures if each is not None} | {"overview"}
    shown = [_linked(each, known) for each in found[:SHOWN]]
    metrics = run.metrics
    numbers: dict[str, Any] = {
        "state": stands.word,
        "step": stands.step,
        "of": stands.of,
        "reward": metrics.last("reward/mean"),
        "accuracy": _accuracies(run),
        "goodput": None if run.goodput is None else run.goodput.total.goodput,
        "findings": [asdict(each) for each in found],
        "complaints": list(run.complaints),
    }
    return part(
        "overview",
        run.label,
        prefix=prefix,
        figures=figures,
        numbers=numbers,
        stands=stands,
        facts=facts(run),
        tiles=_tiles(run, stands),
        findings=shown,
        complaints=run.complaints,
    )


def reward(run: Run) -> Figure | None:
    """Returns the mean reward over steps, with its interval where the ledger has the groups that it is the mean of."""
    points = run.metrics.series("reward/mean")
    if not points:
        return None
    known = {step: each for step, _ in points if (each := run.groups.band(step)) is not None}
    bands = [(step, Band(value, value, value, 1) if step not in known else _around(value, known[step])) for step, value in points]
    note = "The band is the 95 % interval of the mean over a step's groups." if known else ""
    return banded("reward", "Reward", "mean reward of a step", {"reward": bands}, note=note)


def _around(value: float, band: Band) -> Band:
    """Returns the interval of `band` about the mean over attempts; that over groups is another where their sizes differ."""
    return Band(value, value + band.low - band.mean, value + band.high - band.mean, band.count)


def accuracy(run: Run) -> Figure | None:
    """Returns the accuracy on each benchmark over steps, with its interval."""
    series = {benchmark: values for benchmark, values in _intervals(run).items() if values}
    note = "The band is the 95 % interval by bootstrap over problems."
    if not series:
        return curves("accuracy", "Accuracy", "held-out accuracy", {"accuracy": run.metrics.series("eval/accuracy")})
    return banded("accuracy", "Accuracy", "held-out accuracy", series, note=note, dots=True)


def _intervals(run: Run) -> dict[str, list[tuple[int, Band]]]:
    metrics, found = run.metrics, {}
    for name, benchmark in metrics.names(r"eval/accuracy/([A-Za-z0-9_-]+)"):
        lows = dict(metrics.series(f"eval/accuracy_low/{benchmark}"))
        highs = dict(metrics.series(f"eval/accuracy_high/{benchmark}"))
        found[benchmark] = [
            (step, Band(value, lows.get(step, value), highs.get(step, value), 0)) for step, value in metrics.series(name)
        ]
    return found


def _accuracies(run: Run) -> dict[str, Any]:
    return {
        benchmark: {"first": bands[0][1].mean, "last": bands[-1][1].mean, "low": bands[-1][1].low, "high": bands[-1][1].high}
        for benchmark, bands in _intervals(run).items()
        if bands
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns what was run, as names and words; settings that are not known are left out."""
    layout = " ".join(f"{name}={size}" for name in ("tp", "pp", "cp", "ep", "dp") if (size := run.setting(f"parallel.{name}")))
    sizes = (
        ("prompts a step", "train.prompts_per_step"),
        ("attempts a prompt", "rollout.group_size"),
        ("optimizer steps", "train.optimizer_steps"),
    )
    step = ", ".join(f"{value} {words}" for words, key in sizes if (value := run.setting(key)) is not None)
    given = [
        ("objective", run.setting("algorithm.objective.type")),
        ("model", run.setting("model.path")),
        ("data", run.setting("data.train")),
        ("a step", step),
        ("staleness", run.setting("train.staleness")),
        ("layout", layout),
        ("learning rate", run.setting("optimizer.lr")),
        ("seed", run.setting("seed")),
    ]
    if run.story.incarnations:
        fields = run.story.incarnations[-1].began.fields
        given += [("host", fields.get("host")), ("commit", str(fields.get("commit") or "")[:12]), ("job", fields.get("job"))]
    return [(name, str(value)) for name, value in given if value not in (None, "")]


def _tiles(run: Run, stands: Standing) -> list[tuple[str, str, str]]:
    """Returns the large numbers: name, value, and what stands below it."""
    metrics = run.metrics
    steps = f"{stands.step:,}" + (f" / {stands.of:,}" if stands.of else "")
    tiles = [
        ("steps", steps, f"{len(run.story.incarnations)} incarnations" if len(run.story.incarnations) != 1 else "1 incarnation")
    ]
    points = metrics.series("reward/mean")
    if points:
        tiles.append(("reward", f"{points[-1][1]:.3f}", f"at first {points[0][1]:.3f}"))
    for benchmark, each in list(_accuracies(run).items())[:3]:
        tiles.append((f"accuracy, {benchmark}", f"{each['last']:.1%}", f"at first {each['first']:.1%}"))
    if run.goodput is not None:
        tiles.append(("goodput", f"{run.goodput.total.goodput:.0%}", f"of {run.goodput.total.allocated / 3.6e6:,.2f} h"))
    seconds = [value for _, value in metrics.series("time/step")][-20:]
    if seconds:
        tiles.append(("a step", f"{sum(seconds) / len(seconds):,.1f} s", "mean of the last 20"))
    return tiles


def _linked(finding: Finding, known: frozenset[str]) -> dict[str, Any]:
    return {**asdict(finding), "level": finding.level, "evidence": finding.evidence if finding.evidence in known else "curves"}
