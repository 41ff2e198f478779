"""The results of an evaluation as a table for a person."""

from __future__ import annotations

from rich import box
from rich.table import Table

from ctpo_megatron.loop.evaluation.estimators import CONFIDENCE
from ctpo_megatron.loop.evaluation.results import BenchmarkResult, Estimate, Evaluation


def as_table(evaluation: Evaluation) -> Table:
    """Returns a row for each benchmark: avg@n, pass@n and maj@n of all n attempts, with the ends of their intervals."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left")
    table.caption = f"in brackets: {CONFIDENCE:.0%} intervals, by bootstrap over problems"
    for title in ("benchmark", "problems x n", "avg@n", "pass@n", "maj@n", "no answer", "tool used", "tokens"):
        table.add_column(title, justify="left" if title == "benchmark" else "right", no_wrap=True)
    for result in evaluation.results:
        table.add_row(*_row(result))
    return table


def _row(result: BenchmarkResult) -> list[str]:
    samples, summary = result.settings.samples, result.summary()
    of_all = [result.estimates.get(name) for name in ("accuracy", f"pass_at_{samples}", f"maj_at_{samples}")]
    shares = [f"{summary[name]:.0%}" for name in ("no_answer", "tool_rate")]
    numbers = [_shown(each) for each in of_all]
    return [result.settings.name, f"{len(result.problems)} x {samples}", *numbers, *shares, f"{summary['response_tokens']:,.0f}"]


def _shown(estimate: Estimate | None) -> str:
    """Returns 41.7 % as `41.7 [28.3, 55.0]`."""
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
