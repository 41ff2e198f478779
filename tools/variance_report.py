"""What `tools/variance_probe.py` has found, as a table on the console and as a plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gradient_variance as gv
from rich.console import Console
from rich.table import Table

MIN_EFFECTIVE = 30.0  # tokens that carry a bin; with fewer its row is printed faintly
STYLES = (("#4d4d4d", "o"), ("#0072b2", "s"), ("#009e73", "^"), ("#d55e00", "D"), ("#56b4e9", "v"))  # also for the colour-blind


def show(result: dict[str, Any]) -> None:
    """The table: token ratio's variance, and the others' as multiples of it."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    console.print(f"target {result['target']}\nbehaviour {result['behaviour']}")
    console.print(
        f"{result['trajectories']} trajectories of {result['prompts']} held-out prompts, mean reward {result['reward']:.2f}, "
        f"log-probs of servers and behaviour policy differ by at most {result['drift']['max']:.1e}"
    )
    table = Table(title="gradient variance by position; all but token: relative to token, with 95 % interval")
    for name in ("positions", "tokens", "effective", "rms log-ratio", *gv.ESTIMATORS):
        table.add_column(name, justify="right")
    for row in result["bins"]:
        cells = [f"{r['value']:.3f} [dim]{r['low']:.3f} {r['high']:.3f}[/dim]" for r in list(row["relative"].values())[1:]]
        label = f"{row['first']}-{row['last']}" if row["last"] > row["first"] else f"{row['first']}"
        token = f"{row['variance'][gv.ESTIMATORS[0]]['value']:.2e}"
        counts = f"{row['tokens']:,}", f"{row['effective_tokens']:,.0f}"
        style = "dim" if row["effective_tokens"] < MIN_EFFECTIVE else None
        table.add_row(label, *counts, f"{row['log_ratio_rms']:.3f}", token, *cells, style=style)
    console.print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    """Above every position's variance; below the bins' ratios to the token's, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    points, bins = result["by_position"], result["bins"]
    for number, (name, (colour, mark)) in enumerate(zip(gv.ESTIMATORS, STYLES, strict=True)):
        where = [point["position"] for point in points]
        above.plot(where, [point["variance"][name] for point in points], f"{mark}-", color=colour, lw=0.8, ms=3.5, label=name)
        if number == 0:
            continue
        places = [row["first"] * ((row["last"] + 1) / row["first"]) ** ((number + 1) / 6) for row in bins]  # side by side
        rows = [row["relative"][name] for row in bins]
        low, high = ([abs(row[side] - row["value"]) for row in rows] for side in ("low", "high"))
        below.errorbar(places, [row["value"] for row in rows], (low, high), fmt=mark, color=colour, capsize=3, lw=1.4, ms=5)
    for row in bins[1::2]:
        for axes in (above, below):
            axes.axvspan(row["first"], row["last"] + 1, color="0.95", lw=0)
    below.axhline(1, color=STYLES[0][0], lw=1)
    above.set(yscale="log", ylabel="trace of the gradient's covariance")
    below.set(ylabel="relative to the token ratio's", xlabel="position among the trajectory's policy tokens")
    below.set_xscale("log", base=2)
    edges = [row["first"] for row in bins]
    below.set_xticks(edges, [str(edge) for edge in edges])
    below.set_xlim(0.95, bins[-1]["last"] + 1)
    if below.get_ylim()[1] > 4:
        below.set_yscale("log", base=2)
        below.yaxis.set_major_formatter("{x:g}")
    above.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
