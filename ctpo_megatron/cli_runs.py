"""The commands that look at a run's directory: `ctpo ledger`, `alarms`, `report`, `watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctpo_megatron.cli_models import at_home
from ctpo_megatron.config.sources import home_path


def ledger(run_dir: Annotated[Path, typer.Argument(help="of a run", callback=at_home)]) -> None:
    """What became of the groups of a run, by length and difficulty: how many were trained on, replaced or lost."""
    from ctpo_megatron.jobs.ledger import ledger_job

    ledger_job(run_dir)


def alarms(
    run_dir: Annotated[Path, typer.Argument(help="of a run", callback=at_home)],
    overrides: Annotated[list[str] | None, typer.Argument(help="alarms.KEY=value: thresholds to try", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """What alarms say of a run's recorded metrics, with its own thresholds or with others; nothing is written."""
    from ctpo_megatron.jobs.alarms import alarms_job

    alarms_job(run_dir, overrides or [], as_json=as_json)


def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="of runs; several are compared, seeds pooled", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="page to write; default: RUN_DIR/report.html", callback=at_home)] = None,
    png: Annotated[Path | None, typer.Option(help="directory for the figures, each as a PNG", callback=at_home)] = None,
    only: Annotated[list[str] | None, typer.Option("--figure", help="one of the figures for --png; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all numbers as JSON, and write nothing")] = False,
    paper: Annotated[bool, typer.Option("--paper", help="only the figures of CTPO's paper; default: to RUN_DIR/paper")] = False,
) -> None:
    """One page about a run that goes on or has ended: what it learned, where it stands, what deserves a look. It opens from the
    disk and loads nothing."""
    from ctpo_megatron.jobs.report import report_job

    report_job([home_path(each) for each in run_dirs], out=out, png=png, only=only or [], as_json=as_json, paper=paper)


def watch(
    run_dir: Annotated[Path, typer.Argument(help="of a run", callback=at_home)],
    once: Annotated[bool, typer.Option("--once", help="print one frame, for scripts")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two frames")] = 2.0,
) -> None:
    """A run in the terminal, from its directory alone: where it stands, its curves, phases, servers, alarms. Ctrl-C ends it."""
    from ctpo_megatron.jobs.watch import watch_job

    watch_job(run_dir, once=once, every_s=every)
