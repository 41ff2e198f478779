"""What copies of the trainer's state in memory cost a run, and what they save it when a rank is lost.

    python tools/bench_memory.py -- run_dir=runs/quickstart        after `make quickstart`; about five minutes on two cores
    python tools/bench_memory.py --json found.json                 the numbers as a file too

One run. *Cost*: it copies after one step and not after the next, in turn; steps are compared in pairs, by CPU time and by wall
time for each sampled token. *Saved*: then its rank is killed twice, as a step ends: with a copy of the step before in memory, and
without any, so that it goes back to its checkpoint. Each time it is told how long the run needs to be where it was. It says
whether the trainer did come back from memory, and from the checkpoint; no bound is set. docs/bench_survival.md has a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import psutil
import typer
from bench_survival import SPREAD, Seconds, compared, used
from commands import ROOT
from rich.console import Console
from rich.table import Table

from ctpo_megatron import jobs
from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.train import train_job
from ctpo_megatron.loop.memory import MemoryCopies
from ctpo_megatron.loop.state import RunState

BACK = 7  # steps that are made again from the checkpoint


@dataclass
class Story:
    """What is to happen at the end of which step, and what was seen. `cost`: steps that are compared, an odd number."""

    cost: int
    marks: dict[int, tuple[float, Seconds]] = field(default_factory=dict)  # by the step that ended
    killed: dict[int, float] = field(default_factory=dict)  # when, by the step that had just ended
    again: dict[int, float] = field(default_factory=dict)  # when that step ended for the second time

    @property
    def every(self) -> int:
        """Returns after how many steps a checkpoint is due: there is one after as many as are compared, and the next is far."""
        return self.cost + 2

    @property
    def faults(self) -> tuple[int, int]:
        """Returns the steps at whose ends a rank is killed: with a copy of the step before, and without one."""
        return self.cost + 1, self.every + BACK

    def copies_after(self, step: int) -> bool:
        """Whether there is a copy after this step: in turn, then before the first fault, then never."""
        return step % 4 in (0, 1) if step < self.cost else step == self.cost

    def ended(self, step: int) -> None:
        """Note the end of a step; kill a rank where it is to be."""
        now = time.perf_counter()
        self.marks.setdefault(step, (now, used()))
        if step in self.killed:
            self.again.setdefault(step, now)
        elif step in self.faults:
            self.killed[step] = now
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "TrainerActor" in " ".join(process.cmdline()):
                        process.kill()


@contextlib.contextmanager
def told(story: Story) -> Iterator[None]:
    """Runs inside make copies as the story says."""

    class Switched(MemoryCopies):
        def keep(self, state: RunState) -> None:
            if story.copies_after(state.step):
                super().keep(state)
            elif state.step > story.cost + 1:
                self.forget()
            story.ended(state.step)

    with patch.object(jobs.memory, "MemoryCopies", Switched):
        yield


def steps(story: Story, run_dir: Path, attempts: int) -> list[dict[str, Any]]:
    """What each compared step took; a copy that begins when a step ends is made during the next, and counts there."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tokens = {row["step"]: row["rollout/sampled_tokens"] * attempts for row in rows if "train/loss" in row}
    found = []
    for step in range(2, story.cost + 1):
        (begun, before), (ended, after) = story.marks[step - 1], story.marks[step]
        cpu = {kind: total - before.get(kind, 0.0) for kind, total in after.items()}
        found.append({"on": story.copies_after(step - 1), "wall": ended - begun, "cpu": cpu, "tokens": tokens[step]})
    return found


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    config: Annotated[Path, typer.Option(help="YAML file of the run")] = ROOT / "configs" / "quickstart.yaml",
    count: Annotated[int, typer.Option("--steps", min=3, help="that are compared: an odd number, the first does not count")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Print what the copies cost and what they saved."""
    given, story, load = load_config(config, overrides or []), Story(count), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch, told(story):
        run_dir = Path(scratch) / "run"
        paths = [f"model.path={given.model.path}", f"data.train={given.data.train}", "data.eval=null", f"run_dir={run_dir}"]
        plan = [f"train.steps={story.faults[1] + 1}", f"checkpoint.every={story.every}", "checkpoint.memory.every=1"]
        loaded = load_config(config, [*(overrides or []), *paths, *plan, "checkpoint.export=false", "checkpoint.journal=all"])
        asyncio.run(train_job(loaded, StopSignal(), resume="no"))
        rows = steps(story, run_dir, loaded.train.prompts_per_step * loaded.rollout.group_size)
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    kept = [each for each in events if each["event"] == "copy kept"]
    resumed = [each for each in events if each["event"] == "resumed"]
    back = [each["seconds"] for each in events if each["event"] == "trainer restarted"]
    console, ratios = Console(width=130), compared(rows)
    shown = Table("copy", "s", "CPU s", "tokens", title="Each step")
    for row in rows:
        shown.add_row(
            "yes" if row["on"] else "no", f"{row['wall']:.2f}", f"{sum(row['cpu'].values()):.2f}", f"{row['tokens']:.0f}"
        )
    console.print(shown)
    stood, whole = (statistics.median(each[name] for each in kept) for name in ("stood", "seconds"))
    console.print(f"{os.cpu_count()} cores, load {load:.1f} before; a copy has {kept[-1]['bytes']:,} bytes")
    console.print(f"a copy: the trainer stood {stood:.3f} s, whole after {whole:.3f} s (medians of {len(kept)})")
    for name, each in ratios.items():
        low, middle, high = statistics.quantiles(each, n=SPREAD) if len(each) > 1 else each * 3
        console.print(f"with over without, {name} by token: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
    saved: dict[str, Any] = {}
    for fault, source, restart in zip(story.faults, resumed, back, strict=True):
        name = "memory" if source["checkpoint"] == "memory" else "checkpoint"
        saved[name] = {
            "restart": restart,
            "there again": story.again[fault] - story.killed[fault],
            "steps": fault - source["step"],
        }
        console.print(
            f"from {name}: the trainer back after {restart:.1f} s, the run where it was after "
            f"{saved[name]['there again']:.1f} s, with {saved[name]['steps']} steps made again"
        )
    if json_file:
        json_file.write_text(json.dumps({"kept": kept, "ratios": ratios, "steps": rows, "saved": saved}, indent=1))
    raise typer.Exit(0 if saved.keys() == {"memory", "checkpoint"} else 1)


if __name__ == "__main__":
    typer.run(main)
