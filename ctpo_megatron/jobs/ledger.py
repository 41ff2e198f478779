"""`ctpo ledger`: what became of the groups of a run, by length and by difficulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ctpo_megatron.errors import InputError
from ctpo_megatron.loop.ledger import NAME, read_tally
from ctpo_megatron.types import End


def ledger_job(run_dir: Path) -> None:
    """Print the tables of the ledger in `run_dir`, also of a run that goes on. Raises InputError where there is none."""
    path = run_dir / NAME
    if not path.is_file():
        raise InputError(f"{path}: there is no ledger; give the directory of a run of `ctpo train`")
    tally, _ = read_tally(path)
    summary, console = tally.summary(), Console()
    console.print(_table("groups", {"all": summary["groups"]}))
    console.print(_table("mean tokens, up to", summary["by_length"]))
    console.print(_table("mean reward", summary["by_difficulty"]))
    print(  # not by rich, which would wrap it
        f"attempts that were trained on: {summary['ledger/kept_length']:.3f} times the tokens of all that ended, "
        f"{summary['ledger/kept_reward']:+.3f} of their reward"
    )


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title, *End, "trained, share")
    for name, counts in rows.items():
        total = sum(counts.values())
        share = f"{counts[End.TRAINED] / total:.0%}" if total else "-"
        table.add_row(name, *(f"{counts[end]:,}" for end in End), share)
    return table
