"""What came of a chaos run: a row for each fault, and what has to hold in the end."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_faults import CALLED, RANKS, Fault
from chaos_run import Run
from leftovers import left_in_shared_memory
from rich.console import Console
from rich.table import Table
from run_ledger import Sizes, trained_once

DEAD_SEEN_S = 2.0
STOPPED_SEEN_S = 10.0  # and three times the usual duration of the phase
RANK_BACK_S = 45.0
ENDS = 5  # steps at either end whose rewards are compared

Proofs = dict[str, tuple[bool, str]]
"""What has to hold: whether it does, and the figures."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault and what followed; times are seconds since 1970. `at` None: the phase, or the process, did not come."""

    fault: Fault
    at: float | None = None
    seen: float | None = None
    mended: float | None = None
    stepped: float | None = None  # the next training step was done

    def after(self, when: float | None) -> float | None:
        """Returns the seconds from the signal to then."""
        return None if when is None or self.at is None else when - self.at

    @property
    def sentence(self) -> str:
        """Returns it in one line."""
        if self.at is None:
            return f"{self.fault}: never came"
        words = [f"{name} {after:.1f} s" for name, after in self.times.items() if after is not None]
        return f"{self.fault}: {', '.join(words) or 'nothing came of it'}"

    @property
    def times(self) -> dict[str, float | None]:
        """Returns the seconds from the signal to what followed."""
        return {"seen": self.after(self.seen), "back": self.after(self.mended), "next step": self.after(self.stepped)}


def proofs(run: Run, struck: list[Struck], sizes: Sizes, memory: set[str], *, rises: bool) -> Proofs:
    """Returns what has to hold of a run that is over."""
    left = run.left()
    shm = sorted(left_in_shared_memory(memory))
    missed = [check.text for check in trained_once(run.run_dir, sizes) if not check.holds]
    held: Proofs = {
        "the run came to its end with exit code 0": (run.done, run.failed or f"{run.starts} starts"),
        "every fault struck, and a training step followed": (
            all(each.at is not None for each in struck) and all(each.stepped is not None for each in struck[:-1]),
            "; ".join(each.sentence for each in struck if each.stepped is None),
        ),
        "every group trained once": (not missed, "; ".join(missed) or f"{sizes.steps * sizes.groups} groups"),
        "no process left": (not left, ", ".join(str(each) for each in left)),
        "nothing left in shared memory": (not shm, ", ".join(shm)),
    }
    if rises:
        first, last = rewards(run.run_dir / "metrics.jsonl")
        held["the reward rose"] = (last > first, f"{first:.3f} to {last:.3f}")
    return held | bounds(run, struck)


def rewards(metrics: Path) -> tuple[float, float]:
    """Returns the mean reward of the first and of the last steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [row["reward/mean"] for row in rows if "reward/mean" in row]
    return statistics.fmean(found[:ENDS]), statistics.fmean(found[-ENDS:])


def bounds(run: Run, struck: list[Struck]) -> Proofs:
    """Returns whether faults were seen and mended in time. Processes that live for one call are bounded by the call."""
    timed = [each for each in struck if each.fault.kind not in CALLED and each.at is not None]
    dead = [each.after(each.seen) or 0.0 for each in timed if each.fault.by == "KILL"]
    longest = 3 * _usual_s(run) + STOPPED_SEEN_S
    stopped = [each.after(each.seen) or 0.0 for each in timed if each.fault.by == "STOP"]
    quiet = [each for each in timed if each.fault.kind in RANKS and each.fault.phase not in ("start", "stopping")]
    ranks = [each.after(each.mended) or 0.0 for each in quiet]
    touched = [each for each in quiet if each.mended and any(each.at < e["time"] < each.mended for e in _lost(run))]
    return {
        f"death seen within {DEAD_SEEN_S:g} s": _below(dead, DEAD_SEEN_S),
        f"a stop seen within {longest:.1f} s": _below(stopped, longest),
        f"a trainer rank is back within {RANK_BACK_S:g} s": _below(ranks, RANK_BACK_S),
        "servers were not touched by lost ranks": (not touched, ", ".join(str(each.fault) for each in touched)),
    }


def _below(found: list[float], bound: float) -> tuple[bool, str]:
    if not found:
        return True, "no such fault"
    return max(found) <= bound, f"median {statistics.median(found):.1f} s, longest {max(found):.1f} s of {len(found)}"


def _lost(run: Run) -> list[dict[str, Any]]:
    return [each for each in run.events() if each["event"] == "server lost"]


def _usual_s(run: Run) -> float:
    """Returns the median duration of a step's longest phase."""
    found = [max(each["phases"].values()) for each in run.events() if each["event"] == "step" and each["phases"]]
    return statistics.median(found) if found else 0.0


def show(struck: list[Struck], held: Proofs, wall_s: float, run: Run) -> dict[str, Any]:
    """Print both tables; returns all of it as JSON values."""
    table = Table(title=f"{len(struck)} faults in {wall_s:.0f} s")
    for column in ("fault", "phase", "seen s", "back s", "next step s"):
        table.add_column(column, justify="right" if column.endswith(" s") else "left")
    for each in struck:
        cells = [f"{value:.1f}" if value is not None else "" for value in each.times.values()]
        table.add_row(f"SIG{each.fault.by} {each.fault.kind}", each.fault.phase, *cells)
    verdict = Table(title="what has to hold")
    for column in ("", "", ""):
        verdict.add_column(column)
    for name, (ok, words) in held.items():
        verdict.add_row("holds" if ok else "[bold red]does not hold[/]", name, words)
    summary = run.run_dir / "summary.json"
    goodput = json.loads(summary.read_text())["goodput"] if summary.is_file() else {}
    console = Console()
    console.print(table)
    console.print(verdict)
    if goodput:
        console.print(f"goodput {goodput['goodput']:.1%} of {goodput['allocated_s']:.0f} s")
    rows = [{"kind": each.fault.kind, "phase": each.fault.phase, "signal": each.fault.by, **each.times} for each in struck]
    return {"wall_s": wall_s, "faults": rows, "holds": {name: {"holds": ok, "figures": w} for name, (ok, w) in held.items()}} | {
        "goodput": {key: value for key, value in goodput.items() if key != "incarnations"}
    }
