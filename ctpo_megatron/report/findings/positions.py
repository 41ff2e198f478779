"""Rules about positions in trajectories: clipping, growth of the spread, drift, effective sample size."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median

from ctpo_megatron.report.findings.finding import FEWEST, Finding, late, scaled
from ctpo_megatron.report.reading.run import Run

JUMP = 8.0  # times the usual sigma


def clipping(run: Run) -> Iterator[Finding]:
    """Yields clip fractions that depend on the position, or are high everywhere."""
    metrics = run.metrics
    deciles = [
        value for name, _ in metrics.names(r"health/clip_fraction/decile_(\d+)") if (value := late(metrics, name)) is not None
    ]
    if len(deciles) < 5:
        return
    early, end, whole = fmean(deciles[:3]), fmean(deciles[-3:]), fmean(deciles)
    if end > 2 * early and end - early > 0.05:
        yield Finding(
            scaled(end - early, 0.05, 0.4, (40, 70)),
            f"Late tokens are clipped more: {early:.0%} early, {end:.0%} late",
            "Late tokens move more than √t allows: fewer optimizer steps, or `algorithm.restart_at_version`.",
            "clip",
        )
    elif whole > 0.3:
        yield Finding(
            scaled(whole, 0.3, 0.8, (40, 70)),
            f"{whole:.0%} of the tokens are clipped, at every position",
            "The bounds are narrower than the movement: compare σ with `clip_low` and `clip_high`.",
            "clip",
        )


def growth(run: Run) -> Iterator[Finding]:
    """Yields a spread that does not grow like the root of t, where there are ranges of t enough to tell."""
    metrics = run.metrics
    ranges = metrics.names(r"health/log_ratio_std/from_token_(\d+)")
    exponent = late(metrics, "health/log_ratio_growth")
    if exponent is None or len(ranges) < 5:
        return
    if exponent > 0.7:
        words = "Log-ratios of a trajectory go together: a shift of style or length, or versions that change within it."
        yield Finding(
            scaled(exponent, 0.7, 1.2, (35, 65)), f"The spread grows like t^{exponent:.2f}, not like its root", words, "spread"
        )
    elif exponent < 0.3:
        words = "Most of the movement is in the first tokens: a template that is being learned, or a fixed opening."
        yield Finding(
            scaled(0.3 - exponent, 0.0, 0.3, (20, 35)), f"The spread hardly grows with t (t^{exponent:.2f})", words, "spread"
        )


def drift(run: Run) -> Iterator[Finding]:
    """Yields a drift that rises with the position or over the run, above what rounding is."""
    metrics = run.metrics
    ranges = [(int(number), value) for name, number in metrics.names(r"drift/from_token_(\d+)") if (value := late(metrics, name))]
    if len(ranges) > 2 and ranges[-1][1] > 5 * ranges[0][1] and ranges[-1][1] > 1e-4:
        yield Finding(
            scaled(ranges[-1][1], 1e-4, 0.1, (35, 75)),
            f"Drift rises with t: {ranges[0][1]:.1g} nats at first, {ranges[-1][1]:.1g} from token {ranges[-1][0]}",
            "Trainer and engine differ in attention or positions, or in low precision over long contexts.",
            "drift",
        )
    bound = run.setting("drift.mean")
    mean = late(metrics, "drift/mean")
    if isinstance(bound, int | float) and not isinstance(bound, bool) and mean is not None and mean > 0.5 * bound:
        yield Finding(
            scaled(mean / bound, 0.5, 1.0, (45, 75)),
            f"Drift is at {mean / bound:.0%} of the bound that ends the run",
            "",
            "drift",
        )


def sample_size(run: Run) -> Iterator[Finding]:
    """Yields an effective sample size that says that few tokens are most of the gradient."""
    for name, of in (("health/effective_sample_size", "ratios"), ("health/correction_sample_size", "a correction's weights")):
        value = late(run.metrics, name)
        if value is not None and value < 0.5:
            yield Finding(
                scaled(0.5 - value, 0.0, 0.5, (35, 75)),
                f"The effective sample size of {of} is {value:.0%}",
                "Few tokens are most of the gradient: smaller steps, or `algorithm.correction`.",
                "sample_size",
            )


def jump(run: Run) -> Iterator[Finding]:
    """Yields a step in which the policy moved much further than it usually does."""
    points = run.metrics.series("health/log_ratio_sigma")
    moved = [value for _, value in points if value > 0]
    if len(moved) < FEWEST:
        return
    usual, (step, largest) = median(moved), max(points, key=lambda each: each[1])
    if largest > JUMP * usual:
        size = dict(run.metrics.series("health/effective_sample_size")).get(step)
        words = "" if size is None else f" Its effective sample size was {size:.0%}."
        yield Finding(
            scaled(largest / usual, JUMP, 10 * JUMP, (45, 70)),
            f"Step {step} moved the policy {largest / usual:,.0f} times as far as usual",
            f"σ was {largest:.3g}, usually {usual:.3g}.{words} Look at its gradient norm and its trajectories.",
            "sigma",
        )
