"""Tables of the long ablation, from the lines of its runs, as they come out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradient_variance as gv
import numpy as np
from ablate import markdown, spread
from scipy.optimize import brentq
from scipy.stats import chi2, norm
from scipy.stats import t as student

REFERENCE = "ctpo"  # what the others' differences are taken from
THRESHOLD = 0.5  # mean reward
SMOOTHED = 3  # rollout batches in a row whose mean has to reach the threshold
POWER, LEVEL = 0.8, 0.05

Line = Mapping[str, Any]


def steps_to_threshold(rewards: Sequence[float], optimizer_steps: int) -> int | None:
    """Optimizer steps before the first SMOOTHED rollout batches in a row whose mean is at THRESHOLD; None where it never is."""
    for first in range(len(rewards) - SMOOTHED + 1):
        if statistics.fmean(rewards[first : first + SMOOTHED]) >= THRESHOLD:
            return first * optimizer_steps
    return None


def paired(differences: Sequence[float]) -> dict[str, float | int | None]:
    """Student's interval and two-sided p of a mean difference, and the smallest true one that would be found at POWER."""
    found: dict[str, float | int | None] = {**spread(differences), "p": None, "detectable": None}
    if len(differences) < 2:
        return found
    count, error = len(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return found | {"p": 1.0 if statistics.fmean(differences) == 0 else 0.0, "detectable": 0.0}
    ratio = abs(statistics.fmean(differences)) / error
    return found | {"p": 2 * float(student.sf(ratio, count - 1)), "detectable": error * detectable(count)}


def detectable(count: int) -> float:
    """The mean, in standard errors, that a two-sided t test of `count` pairs at LEVEL finds with probability POWER."""
    freedom = count - 1
    middles = (np.arange(4000) + 0.5) / 4000
    bounds = student.ppf(1 - LEVEL / 2, freedom) * np.sqrt(chi2.ppf(middles, freedom) / freedom)  # by the sample's deviation

    def lack(shift: float) -> float:
        return float(np.mean(norm.sf(bounds - shift) + norm.cdf(-bounds - shift))) - POWER

    return float(brentq(lack, 0.0, 10 * bounds.max()))


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's p-values of several tests together, in their order."""
    found, largest = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[place]))
        found[place] = largest
    return found


def best_rate(lines: Sequence[Line], method: str) -> float | None:
    """The rate with the highest mean final reward on the tuning seeds; of equal ones the one that learned faster."""
    rates: dict[float, list[Line]] = {}
    for line in lines:
        if (line["method"], line["purpose"]) == (method, "tune"):
            rates.setdefault(line["rate"], []).append(line)
    return max(rates, key=lambda rate: (mean_of(rates[rate], final), mean_of(rates[rate], area)), default=None)


def before(line: Line) -> float:
    """Reward of the cold start."""
    return float(line["before"])


def final(line: Line) -> float:
    """Reward after the last step."""
    return float(line["final"])


def area(line: Line) -> float:
    """Mean reward over the rollout batches: the area under the learning curve. A run that ended early goes on with zero."""
    return sum(line["rewards"]) / line["batches"]


def mean_of(lines: Sequence[Line], value: Callable[[Line], float]) -> float:
    """Mean over runs."""
    return statistics.fmean(map(value, lines))


def tests_of(lines: Sequence[Line], method: str) -> dict[int, Line]:
    """The test runs of a method at its rate, by seed."""
    rate = best_rate(lines, method)
    return {line["seed"]: line for line in lines if (line["method"], line["purpose"], line["rate"]) == (method, "test", rate)}


def report(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """All tables under their captions, as Markdown."""
    parts = {
        "Tuning: mean final reward by rate, per cent": tuning(lines, methods),
        "Test: mean ± half of the 95 % interval, per cent": results(lines, methods),
        f"Paired differences from {REFERENCE}, points": differences(lines, methods),
        "Optimizer steps of the test runs": behaviour(lines, methods),
        "Variance of a trajectory's gradient relative to the token ratio's": variances(lines, methods),
        f"Variance of a token's gradient relative to the token ratio's, by position, runs of {REFERENCE}": variance_bins(lines),
    }
    return "\n".join(f"{caption}:\n\n{part}" for caption, part in parts.items() if part)


def tuning(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """Mean final reward of every rate that was tried, in per cent; the chosen one in bold."""
    tuned = [line for line in lines if line["purpose"] == "tune"]
    rates = sorted({line["rate"] for line in tuned})
    rows = [("method", *(f"{rate:.1e}" for rate in rates))]
    for method in methods:
        cells = []
        for rate in rates:
            values = [line["final"] for line in tuned if (line["method"], line["rate"]) == (method, rate)]
            text = f"{100 * statistics.fmean(values):.1f}" if values else ""
            cells.append(f"**{text}**" if values and rate == best_rate(lines, method) else text)
        rows.append((method, *cells))
    return markdown(rows)


def results(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """What the test runs learned."""
    head = ("method", "rate", "runs", "before", "final reward", "mean reward", f"steps to {100 * THRESHOLD:.0f} %", "reached")
    rows: list[tuple[str, ...]] = [head]
    for method in methods:
        if not (own := list(tests_of(lines, method).values())):
            continue
        reached = [steps_to_threshold(line["rewards"], line["optimizer_steps"]) for line in own]
        got = [steps for steps in reached if steps is not None]
        cells = (interval([value(line) for line in own]) for value in (before, final, area))
        steps = f"{statistics.fmean(got):.0f} ({min(got)} to {max(got)})" if got else ""
        rows.append((method, f"{own[0]['rate']:.1e}", str(len(own)), *cells, steps, f"{len(got)} of {len(own)}"))
    return markdown(rows)


def interval(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean ± half of the 95 % interval, in per cent."""
    found, form = spread(values), "{:+.1f}" if signed else "{:.1f}"
    if found["mean"] is None:
        return ""
    text = form.format(100 * found["mean"])
    return text if found["half_width"] is None else f"{text} ± {100 * found['half_width']:.1f}"


def differences(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """Differences from REFERENCE at the same seed, in points: interval, p, Holm's p over the column, smallest detectable."""
    others = [method for method in methods if method != REFERENCE and tests_of(lines, method)]
    of_final, of_area = (compared(lines, others, value) for value in (final, area))
    columns = ("p", "Holm", "80 %")
    rows: list[tuple[str, ...]] = [(f"less {REFERENCE}'s", "pairs", "final", *columns, "mean", *columns)]
    rows += [(method, *of_final[method], *of_area[method][1:]) for method in others]
    return markdown(rows) if others else ""


def compared(lines: Sequence[Line], others: Sequence[str], value: Callable[[Line], float]) -> dict[str, tuple[str, ...]]:
    """Cells of each of the `others`: pairs, difference, p, Holm's p and what could have been detected."""
    reference = tests_of(lines, REFERENCE)
    pairs = {}
    for method in others:
        own = tests_of(lines, method)
        pairs[method] = [value(line) - value(reference[seed]) for seed, line in own.items() if seed in reference]
    found = {method: paired(values) for method, values in pairs.items()}
    known = {method: each["p"] for method, each in found.items() if each["p"] is not None}
    together = dict(zip(known, holm(list(known.values())), strict=True))
    return {
        method: (
            str(each["n"]),
            interval(pairs[method], signed=True),
            chance(each["p"]),
            chance(together.get(method)),
            points(each["detectable"]),
        )
        for method, each in found.items()
    }


def chance(p: float | None) -> str:
    """A probability with two digits."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def points(value: float | int | None) -> str:
    """A difference in points."""
    return "" if value is None else f"{100 * value:.1f}"


def behaviour(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """How the test runs' steps went: means over batches and seeds, largest gradient norm, errors."""
    numbers = ("clipped, %", "KL per token", "rms log-ratio", "largest gradient norm", "largest fall")
    rows: list[tuple[str, ...]] = [("method", "errors", *numbers)]
    for method in methods:
        own = list(tests_of(lines, method).values())
        steps = [step for line in own for step in line["steps"]]
        if not steps:
            continue
        means = {key: statistics.fmean(step[key] for step in steps) for key in ("clip_fraction", "kl", "log_ratio_rms")}
        fall = max(largest_fall(line["rewards"]) for line in own)
        errors = sum(line["error"] is not None for line in own)
        cells = (f"{100 * means['clip_fraction']:.1f}", f"{means['kl']:.1e}", f"{means['log_ratio_rms']:.2g}")
        rows.append((method, str(errors), *cells, f"{max(step['grad_norm'] for step in steps):.2g}", f"{100 * fall:.0f}"))
    return markdown(rows)


def largest_fall(rewards: Sequence[float]) -> float:
    """How far a run's reward fell at most below the best before."""
    best, fall = 0.0, 0.0
    for reward in rewards:
        best = max(best, reward)
        fall = max(fall, best - reward)
    return fall


def probes_of(lines: Sequence[Line], method: str) -> list[list[Line]]:
    """The probes of each test run that came to something."""
    found = ([each for each in line["probes"] if "error" not in each] for line in tests_of(lines, method).values())
    return [each for each in found if each]


def variances(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """Variance of a whole trajectory's gradient, as a multiple of the token ratio's: geometric mean over runs, 95 % interval."""
    rows: list[tuple[str, ...]] = [("run of", "runs", *gv.ESTIMATORS[1:])]
    for method in methods:
        if own := probes_of(lines, method):
            cells = (multiples([[each["relative"][name] for each in run] for run in own]) for name in gv.ESTIMATORS[1:])
            rows.append((method, str(len(own)), *cells))
    return markdown(rows) if len(rows) > 1 else ""


def variance_bins(lines: Sequence[Line]) -> str:
    """The same of single tokens by position, in the runs of REFERENCE."""
    own = probes_of(lines, REFERENCE)
    if not own:
        return ""
    rows: list[tuple[str, ...]] = [("positions", "std of log-ratio", *gv.ESTIMATORS[1:])]
    for place, each in enumerate(own[0][0]["bins"]):
        bins = [[probe["bins"][place] for probe in run] for run in own]
        std = statistics.fmean(found["log_ratio_std"] for run in bins for found in run)
        cells = (multiples([[found["relative"][name] for found in run] for run in bins]) for name in gv.ESTIMATORS[1:])
        rows.append((f"{each['first']}-{each['last']}", f"{std:.3f}", *cells))
    return markdown(rows)


def multiples(runs: Sequence[Sequence[float]]) -> str:
    """Geometric mean over a run's probes, then over runs, with Student's 95 % interval of the logarithm; zeros are left out."""
    logs = [[math.log(value) for value in run if value > 0] for run in runs]
    found = spread([statistics.fmean(run) for run in logs if run])
    if found["mean"] is None:
        return ""
    middle, half = found["mean"], found["half_width"]
    if half is None:
        return f"{math.exp(middle):.2f}"
    return f"{math.exp(middle):.2f} ({math.exp(middle - half):.2f} to {math.exp(middle + half):.2f})"
