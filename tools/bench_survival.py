"""What it costs a run to be able to survive: its journal, and the watch over its processes, against a run without them.

    python tools/bench_survival.py -- run_dir=runs/quickstart      after `make quickstart`; about seven minutes on two cores
    python tools/bench_survival.py --json found.json               the numbers as a file too

Two measurements. *Idle*: all processes of the run are up and have nothing to do; the watch asks and looks for ten seconds, then
it does not, in turn, and the difference in CPU time is its own. *Training*: the run trains, with journal and watch in one step
and without them in the next, in turn; what the journal does is timed by itself, too. The bound is on CPU time: steps on two busy
cores differ by more than a hundredth anyway. Ends with exit code 1 when it is missed. docs/bench_survival.md has a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import psutil
import typer
from bench_loss import Check
from commands import ROOT
from rich.console import Console
from rich.table import Table

from ctpo_megatron import cluster, jobs
from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.cluster.watch.watchdog import Watchdog
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.inputs import open_model
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.jobs.train import train_job
from ctpo_megatron.record.files import GrowingFile
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.types import Composition, Trajectory

MOST = 0.01  # of a step
SETTLE_S = 1.5  # after the watch was switched
KINDS = {"guard.py": "guard", "TrainerActor": "trainer", "EngineActor": "server's actor", "sglang": "server"}  # else: Ray's
SPREAD = 4  # quartiles


def cpu_s(pid: int, *, thread: bool = False) -> float:
    """CPU time of a process, or of one thread, in seconds: the kernel's clock, to the nanosecond. 0 for one that is gone."""
    try:
        return time.clock_gettime((~pid << 3) | (6 if thread else 2))
    except OSError:
        return 0.0


Seconds = dict[str, float]  # and counts, by what they are of


def used() -> Seconds:
    """CPU seconds of all processes of this run by kind; this one is the driver, the thread of its loop watch apart."""
    found: Seconds = defaultdict(float, driver=cpu_s(os.getpid()))
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(each.cmdline())
            found[next((kind for word, kind in KINDS.items() if word in words), "Ray")] += cpu_s(each.pid)
    for thread in threading.enumerate():
        if thread.name == "loop-watch" and thread.native_id:
            found["loop watch"] += cpu_s(thread.native_id, thread=True)
    found["driver"] -= found["loop watch"]
    return found


@dataclass(frozen=True)
class Mark:
    """The beginning of a step."""

    at: float
    cpu: Seconds
    journal: Seconds


class Inside(threading.local):
    """Seconds of what was timed within something else that is timed, in this thread."""

    wall = 0.0
    cpu = 0.0


STANDING = ("note", "write", "publication", "decision")  # the event loop waits for them; not for a sync


@dataclass
class Switch:
    """Whether journal and watch do their work, and what was seen of it. `journal`: seconds and counts so far."""

    on: bool = True
    marks: list[Mark] = field(default_factory=list)
    journal: Seconds = field(default_factory=lambda: defaultdict(float))
    _inside: Inside = field(default_factory=Inside)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time something that the journal does, without what is timed within it."""
        inside = self._inside
        before, inside.wall, inside.cpu = (inside.wall, inside.cpu), 0.0, 0.0
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        own = cpu - inside.cpu
        self.add({what: 1, f"{what} wall": wall - inside.wall, f"{what} cpu": own, "cpu": own})
        inside.wall, inside.cpu = before[0] + wall, before[1] + cpu

    def add(self, spent: Seconds) -> None:
        """Count what the journal did."""
        with self._lock:
            for what, seconds in spent.items():
                self.journal[what] += seconds

    def turn(self, version: int) -> None:
        """A step begins: with everything, without, without, with, ..."""
        self.marks.append(Mark(time.perf_counter(), used(), dict(self.journal)))
        self.on = version % 4 in (0, 1)


@contextlib.contextmanager
def switched(switch: Switch) -> Iterator[None]:
    """Runs inside have a watch and a journal that do nothing while `switch` is off."""

    class SwitchedWatchdog(Watchdog):
        async def _round(self) -> None:
            if switch.on:
                await super()._round()
            else:
                self._forgive()

    class SwitchedJournal(Journal):
        def published(self, version: int, digest: str) -> None:
            with switch.timed("publication"):
                super().published(version, digest)
            switch.turn(version)

        def note(self, kept: Attempt | Trajectory) -> None:
            if switch.on:
                with switch.timed("note"):
                    super().note(kept)

        def decided(self, made: Composition) -> None:
            with switch.timed("decision"):
                super().decided(made)

        def _write(self) -> None:
            if not self._noted:  # by far most of what `find` asks for
                super()._write()
                return
            with switch.timed("write"):  # of what was noted, whenever that is
                super()._write()

        async def sync(self) -> None:
            if switch.on:
                await super().sync()

    sync = GrowingFile.sync

    def timed_sync(file: GrowingFile) -> None:
        with switch.timed("sync"):
            sync(file)

    with (
        patch.object(cluster.runtime, "Watchdog", SwitchedWatchdog),
        patch.object(jobs.journal, "Journal", SwitchedJournal),
        patch.object(GrowingFile, "sync", timed_sync),  # only the journal's are
    ):
        yield


async def idle(config: RunConfig, run_dir: Path, switch: Switch, pairs: int, seconds: float) -> dict[bool, list[Seconds]]:
    """CPU seconds per second of the run's processes while they have nothing to do, watched and not."""
    model, found = open_model(config, "train"), dict[bool, list[Seconds]]({True: [], False: []})
    async with Runtime(config, model.shape, topology_of(config), run_dir, total_steps=1):
        for turn in range(2 * pairs):
            switch.on = turn % 4 in (0, 3)
            await asyncio.sleep(SETTLE_S)
            begun, before = time.perf_counter(), used()
            await asyncio.sleep(seconds)
            after, lasted = used(), time.perf_counter() - begun
            found[switch.on].append({kind: (after[kind] - before[kind]) / lasted for kind in after})
    return found


def steps(switch: Switch, run_dir: Path, attempts: int) -> list[dict[str, Any]]:
    """What each step took, the first one left out."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tokens = {row["step"]: row["rollout/sampled_tokens"] * attempts for row in rows if "train/loss" in row}
    found = []
    for version, (begin, end) in enumerate(zip(switch.marks, switch.marks[1:], strict=False)):
        spent = {what: total - begin.journal.get(what, 0.0) for what, total in end.journal.items()}
        cpu = {kind: total - begin.cpu.get(kind, 0.0) for kind, total in end.cpu.items()}
        wall = end.at - begin.at
        found.append({"on": version % 4 in (0, 1), "wall": wall, "cpu": cpu, "journal": spent, "tokens": tokens[version + 1]})
    return found[1:]


def compared(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """With over without, for each two steps that follow one another: wall time and CPU time, both by sampled token."""
    found: dict[str, list[float]] = {"wall": [], "CPU": []}
    for one, other in zip(rows[::2], rows[1::2], strict=False):
        there, gone = (one, other) if one["on"] else (other, one)
        found["wall"].append(there["wall"] / there["tokens"] * gone["tokens"] / gone["wall"])
        cpu = [sum(each["cpu"].values()) / each["tokens"] for each in (there, gone)]
        found["CPU"].append(cpu[0] / cpu[1])
    return found


def costs(idle_rows: dict[bool, list[Seconds]], rows: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers that the bound is about; of the steps those that had everything."""
    with_all = [row for row in rows if row["on"]]
    wall, cpu = sum(row["wall"] for row in with_all), sum(sum(row["cpu"].values()) for row in with_all)
    watch = sum(watch_of(idle_rows).values())
    journal = sum(row["journal"].get("cpu", 0.0) for row in with_all)
    standing, standing_cpu = (
        sum(row["journal"].get(f"{what} {unit}", 0.0) for row in with_all for what in STANDING) for unit in ("wall", "cpu")
    )
    cores = os.cpu_count() or 1
    return {
        "watch, CPU s per s": watch,
        "watch, of the CPU time of a step": watch * wall / cpu,
        "watch, of all processors": watch / cores,
        "journal, of the CPU time of a step": journal / cpu,
        "event loop in the journal, of the time": standing / wall,
        "event loop in the journal, computing": standing_cpu / wall,
        "seconds a step": wall / len(with_all),
        "CPU seconds a step": cpu / len(with_all),
    }


def watch_of(idle_rows: dict[bool, list[Seconds]]) -> dict[str, float]:
    """CPU seconds per second that the watch costs each kind of process; guard and loop watch are never switched off."""
    kinds = sorted({kind for rows in idle_rows.values() for row in rows for kind in row})
    means = {on: {kind: statistics.median(row[kind] for row in rows) for kind in kinds} for on, rows in idle_rows.items()}
    always = ("guard", "loop watch")
    return {kind: means[True][kind] - (0.0 if kind in always else means[False][kind]) for kind in kinds}


def show(idle_rows: dict[bool, list[Seconds]], rows: list[dict[str, Any]], console: Console) -> None:
    """Both tables."""
    watch = watch_of(idle_rows)
    shown = Table("process", "watched", "not watched", "the watch", title="Idle: CPU milliseconds per second, medians")
    for kind, own in watch.items():
        both = (statistics.median(row[kind] for row in idle_rows[on]) for on in (True, False))
        shown.add_row(kind, *(f"{1000 * each:.2f}" for each in both), f"{1000 * own:.2f}")
    console.print(shown)
    often = ("note", "write", "sync")
    of_each = [f"{what} {unit}ms" for what in often for unit in ("", "CPU ")]
    counted = [f"{what}s" for what in often]
    shown = Table("journal, watch", "s", "CPU s", "tokens", *counted, *of_each, title="Training: each step")
    for row in rows:
        spent = row["journal"]
        counts = [f"{spent.get(what, 0):.0f}" for what in often]
        times = [
            f"{1000 * spent.get(f'{what} {unit}', 0.0) / max(spent.get(what, 0), 1):.3f}"
            for what in often
            for unit in ("wall", "cpu")
        ]
        cpu = f"{sum(row['cpu'].values()):.2f}"
        shown.add_row("on" if row["on"] else "off", f"{row['wall']:.2f}", cpu, f"{row['tokens']:.0f}", *counts, *times)
    console.print(shown)


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    config: Annotated[Path, typer.Option(help="YAML file of the run")] = ROOT / "configs" / "quickstart.yaml",
    count: Annotated[int, typer.Option("--steps", min=3, help="an odd number: the first one does not count")] = 13,
    pairs: Annotated[int, typer.Option(min=1, help="of idle stretches")] = 4,
    seconds: Annotated[float, typer.Option(min=1.0, help="an idle stretch lasts")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Print both tables and the bounds."""
    given = load_config(config, overrides or [])
    switch, load = Switch(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch, switched(switch):
        paths = [f"model.path={given.model.path}", f"data.train={given.data.train}", "data.eval=null"]
        plan = [f"train.steps={count}", "checkpoint.every=0", "checkpoint.export=false", "checkpoint.journal=all"]
        loaded = load_config(config, [*(overrides or []), *paths, *plan, f"run_dir={scratch}/run"])
        for name in ("idle", "run"):
            (Path(scratch) / name / "logs").mkdir(parents=True)
        idle_rows = asyncio.run(idle(loaded, Path(scratch) / "idle", switch, pairs, seconds))
        asyncio.run(train_job(loaded, StopSignal(), resume="no"))
        attempts = loaded.train.prompts_per_step * loaded.rollout.group_size
        rows = steps(switch, Path(scratch) / "run", attempts)
        size = sum(path.stat().st_size for path in (Path(scratch) / "run" / "journal").iterdir())
    console = Console(width=150)
    show(idle_rows, rows, console)
    found, ratios = costs(idle_rows, rows), compared(rows)
    sampled = sum(row["tokens"] for row in rows if row["on"])
    console.print(f"{os.cpu_count()} cores, load {load:.1f} before; journal: {size / max(sampled, 1):.0f} bytes by sampled token")
    for name, each in ratios.items():
        spread = statistics.quantiles(each, n=SPREAD) if len(each) > 1 else each * 3
        console.print(
            f"with over without, {name} by token: median {spread[1]:.3f}, quartiles {spread[0]:.3f} and {spread[2]:.3f}"
        )
    for name, value in found.items():
        console.print(f"{name}: {value:.4f}")
    if json_file:
        everything = {"costs": found, "ratios": ratios, "steps": rows, "idle": {str(on): each for on, each in idle_rows.items()}}
        json_file.write_text(json.dumps(everything, indent=1))
    both = found["watch, of all processors"] + found["journal, of the CPU time of a step"]
    bounds = [Check(f"journal and watch {both:.4f} of a step that keeps all processors busy (at most {MOST})", both <= MOST)]
    for check in bounds:
        print(f"{'holds ' if check.holds else 'MISSED'}  {check.text}")
    raise typer.Exit(0 if all(check.holds for check in bounds) else 1)


if __name__ == "__main__":
    typer.run(main)
