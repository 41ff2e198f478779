"""Rules about what is learned: reward, accuracy, entropy, groups, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import sqrt
from statistics import stdev

from ctpo_megatron.report.findings.finding import FEWEST, Finding, ends, late, scaled
from ctpo_megatron.report.reading.metrics import Point
from ctpo_megatron.report.reading.run import Run


def reward(run: Run) -> Iterator[Finding]:
    """Yields how the reward went: up, nowhere, or down from its best."""
    points = run.metrics.series("reward/mean")
    course = ends(points)
    if course is None:
        return
    first, last = course
    noise = _noise(points)
    size = max(1, len(points) // 5)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    blocks = [(end - begin) / size for begin, end in zip(sums, sums[size:], strict=False)]
    best = max(blocks)
    if best - last > max(4 * noise, 0.1 * abs(best)):
        at = points[blocks.index(best)][0]
        weight = scaled((best - last) / max(abs(best), 1e-9), 0.1, 0.6, (55, 90))
        yield Finding(
            weight,
            f"The reward fell from {best:.3g} to {last:.3g}",
            f"It was best around step {at}. Look at clipping, entropy and the trajectories since.",
            "reward",
        )
    elif last - first > 2 * noise:
        yield Finding(
            5, f"The reward rose from {first:.3g} to {last:.3g}", "Means of the first and the last fifth of the steps.", "reward"
        )
    elif len(points) >= 2 * FEWEST:
        yield Finding(
            40,
            f"The reward stays at {last:.3g}",
            f"First fifth {first:.3g}, last fifth {last:.3g}: the difference is within the noise of single steps.",
            "reward",
        )


def _noise(points: list[Point]) -> float:
    """Returns the standard error of the mean of a fifth of a series, from the differences of its neighbours."""
    values = [value for _, value in points]
    steps = [b - a for a, b in pairwise(values)]
    return stdev(steps) / sqrt(2) / sqrt(max(1, len(values) // 5)) if len(steps) > 1 else 0.0


def accuracy(run: Run) -> Iterator[Finding]:
    """Yields how the accuracy went, where an interval is known and it moved beyond it."""
    metrics = run.metrics
    for name, benchmark in metrics.names(r"eval/accuracy/([A-Za-z0-9_-]+)"):
        points = metrics.series(name)
        if len(points) < 2:
            continue
        (_, first), (step, last) = points[0], points[-1]
        lows = dict(metrics.series(f"eval/accuracy_low/{benchmark}"))
        highs = dict(metrics.series(f"eval/accuracy_high/{benchmark}"))
        low, high = lows.get(step, last), highs.get(step, last)
        words = f"Interval after step {step}: {low:.1%} to {high:.1%}."
        if high < first:
            yield Finding(85, f"Accuracy on {benchmark} fell from {first:.1%} to {last:.1%}", words, "accuracy")
        elif low > first:
            yield Finding(6, f"Accuracy on {benchmark} rose from {first:.1%} to {last:.1%}", words, "accuracy")
        else:
            yield Finding(30, f"Accuracy on {benchmark} has not moved beyond chance", f"{first:.1%} before. {words}", "accuracy")


def entropy(run: Run) -> Iterator[Finding]:
    """Yields a policy that has nearly no choice left."""
    course = ends(run.metrics.series("train/entropy"))
    if course is None or course[0] <= 0:
        return
    first, last = course
    if last < 0.25 * first:
        solved = (late(run.metrics, "reward/mean") or 0.0) > 0.9
        weight = 20 if solved else scaled(last / first, 0.25, 0.02, (50, 80))
        why = "The reward is high, so this may be right." if solved else "What is no longer sampled is no longer learned from."
        yield Finding(weight, f"Entropy fell from {first:.3g} to {last:.3g} nats a token", why, "entropy")


def groups(run: Run) -> Iterator[Finding]:
    """Yields steps whose groups mostly have equal rewards: they carry no signal, unless a critic learns."""
    if late(run.metrics, "critic/loss") is not None:
        return
    mixed = late(run.metrics, "reward/mixed_groups")
    if mixed is not None and mixed < 0.3:
        solved = (late(run.metrics, "reward/mean") or 0.0) > 0.9
        yield Finding(
            scaled(mixed, 0.3, 0.0, (25, 45) if solved else (35, 75)),
            f"Only {mixed:.0%} of the groups have rewards that differ",
            "The others have no advantage and teach nothing: "
            + ("harder" if solved else "easier or filtered")
            + " prompts would.",
            "mixed_groups",
        )


def answers(run: Run) -> Iterator[Finding]:
    """Yields trajectories that are cut off, answers without a verdict, and tool calls that fail."""
    metrics = run.metrics
    cut = late(metrics, "rollout/truncated")
    if cut is not None and cut > 0.1:
        yield Finding(
            scaled(cut, 0.1, 0.6, (35, 75)),
            f"{cut:.0%} of the trajectories are cut off",
            "They ended by a budget, not by a finished turn: see `rollout.max_response_tokens` and the lengths.",
            "lengths",
        )
    undecided, judged = metrics.total("reward/undecided"), sum(map(len, run.groups.rewards.values()))
    if undecided > 0 and undecided > 0.01 * judged:
        yield Finding(
            scaled(undecided / max(judged, 1), 0.01, 1.0, (35, 70)),
            f"{undecided:,.0f} answers had no verdict",
            "The grader came to no end or to nonsense; their reward is 0 whatever they say.",
            "ledger",
        )
    failing = late(metrics, "tool/error_rate")
    if failing is not None and failing > 0.25:
        yield Finding(
            scaled(failing, 0.25, 0.9, (30, 60)),
            f"{failing:.0%} of the tool calls fail",
            "The policy's code raises or runs out of time.",
            "tool",
        )


def lengths(run: Run) -> Iterator[Finding]:
    """Yields trajectories that grow or shrink a lot while the reward does not."""
    course = ends(run.metrics.series("rollout/sampled_tokens"))
    if course is None or min(course) <= 0:
        return
    first, last = course
    factor = last / first
    if factor > 2.0 or factor < 0.5:
        word = "longer" if factor > 1 else "shorter"
        yield Finding(
            scaled(abs(factor - 1), 0.5, 3.0, (15, 35)),
            f"Trajectories became {word}: {first:,.0f} to {last:,.0f} tokens",
            "Read some of them: is it thought, or filling?",
            "lengths",
        )
