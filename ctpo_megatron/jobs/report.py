"""`ctpo report`: a page, figures and numbers of runs, from their directories alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ctpo_megatron.errors import InputError, near_miss
from ctpo_megatron.report.figures.figure import Figure
from ctpo_megatron.report.paper.figures import paper_figures
from ctpo_megatron.report.reading.run import read_runs
from ctpo_megatron.report.report import Report, make_report, write_figures, write_page
from ctpo_megatron.report.section import Section
from ctpo_megatron.report.viewer.section import beside, trajectories_section

PAGE = "report.html"


def report_job(
    run_dirs: list[Path], *, out: Path | None, png: Path | None, only: Sequence[str], as_json: bool, paper: bool
) -> None:
    """Write the page at `out`, and each figure, or those of `only`, as PNGs in `png`; with `as_json` print all numbers instead.

    `out`: None for report.html in the run directory, or here where there are several. `paper`: only the figures of CTPO's paper.
    Raises InputError for a directory that is no run's, and for a figure that there is not.
    """
    if paper:
        figures = paper_figures(read_runs(run_dirs))
        directory = png or run_dirs[0] / "paper"
        _say(write_figures(_chosen(figures, only), directory))
        return
    report = make_report(run_dirs)
    if as_json:
        print(json.dumps(report.numbers(), indent=1, allow_nan=False))
        return
    chosen = _chosen(report.figures(), only) if png is not None or only else {}
    page = out or (run_dirs[0] / PAGE if len(run_dirs) == 1 else Path(PAGE))
    write_page(report, page, viewer_section(report, page))
    _say([page])
    if beside(page).is_dir():
        print(f"report: {beside(page)}/ belongs beside it: the page reads trajectories there")
    if png is not None:
        _say(write_figures(chosen, png))


def viewer_section(report: Report, page: Path) -> Section | None:
    """Returns the section in which single trajectories are read; None where no run kept any."""
    return trajectories_section([run.directory for run in report.runs], page)


def _chosen(figures: dict[str, Figure], only: Sequence[str]) -> dict[str, Figure]:
    for name in only:
        if name not in figures:
            raise InputError(f"--figure {name}: there is none.{near_miss(name, figures)} Allowed: {', '.join(figures)}")
    return {name: figures[name] for name in only} if only else figures


def _say(paths: Sequence[Path]) -> None:
    for path in paths:
        print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
