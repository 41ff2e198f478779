"""What a start costs: `ctpo train` of this tree until it is ready, against the same of another tree, in turn.

    git worktree add --detach ../before d5ca9ae
    python tools/bench_start.py ../before                     a toy model, one trainer rank, one server; about two minutes
    python tools/bench_start.py ../before --repeats 5 rollout.engine.servers=2 parallel.tp=2

Seconds are those that the run says itself ("ready after"), from the checked command line to weights that are proven on every
server, and those from the start of the process. CPU seconds are of all processes of the run until then, dead ones included. The
ratio of medians counts. Ends with exit code 1 when a bound is missed.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from bench_loss import Check
from commands import END_TIMEOUT_S, ROOT

from ctpo_megatron.record.events import RunReady
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task

MAX_RATIO = 0.7
LIMIT_S = 300.0
POLL_S = 0.05
READY = f'"event": "{RunReady.name}"'  # in a line of events.jsonl


class Cost(NamedTuple):
    """Of one start."""

    ready_s: float  # as the run tells it
    wall_s: float  # from the start of the process
    cpu_s: float
    by_process: dict[str, float]  # CPU seconds of those that live when it is ready, by their names


def start_once(tree: Path, words: list[str], scratch: Path) -> Cost:
    """Start a run of `tree` and end it as soon as it is ready."""
    run_dir, output = scratch / "run", scratch / "output"
    command = [sys.executable, "-m", "ctpo_megatron.cli", "train", str(ROOT / "configs" / "quickstart.yaml"), *words]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as users have it
    begun = time.monotonic()
    with output.open("w") as sink:
        run = subprocess.Popen(
            [*command, f"run_dir={run_dir}"],
            cwd=tree,
            env={**plain, "PYTHONPATH": str(tree)},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        while (ready := ready_line(run_dir / "events.jsonl")) is None:
            if run.poll() is not None or time.monotonic() - begun > LIMIT_S:
                raise typer.Exit(_failed(output))
            time.sleep(POLL_S)
        wall, (cpu, named) = time.monotonic() - begun, cpu_of_tree(run.pid)
    finally:
        run.send_signal(signal.SIGTERM)
        try:
            run.wait(END_TIMEOUT_S)
        finally:
            run.kill()
    return Cost(ready, wall, cpu, named)


def _failed(output: Path) -> int:
    print(output.read_text(), file=sys.stderr)
    return 1


def ready_line(events: Path) -> float | None:
    """Seconds that the run says it took to be ready; None where it is not yet."""
    lines = events.read_text().splitlines() if events.exists() else []
    found = [json.loads(line) for line in lines if READY in line]
    return float(found[-1]["seconds"]) if found else None


def cpu_of_tree(pid: int) -> tuple[float, dict[str, float]]:
    """CPU seconds of a process and all below it, with those of the dead that were waited for; and of the living by name."""
    total, named = 0.0, dict[str, float]()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times, name = process.cpu_times(), _name(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
        named[name] = named.get(name, 0.0) + times.user + times.system
    return total, named


def _name(words: list[str]) -> str:
    """What a process is, from its command line."""
    known = ("gcs_server", "raylet", "dashboard", "runtime_env", "engine.sglang.entry", "ctpo_megatron.cli", "default_worker")
    line = " ".join(words)
    return words[0][:40] if line.startswith(("ray::", "sglang::")) else next((each for each in known if each in line), line[-40:])


def main(
    before: Annotated[Path, typer.Argument(help="the other tree, a checkout of an earlier commit")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    repeats: Annotated[int, typer.Option(help="of which the median counts, after one that does not")] = 3,
) -> None:
    """Print what a start of each tree costs, and the bounds."""
    trees = {"before": before.resolve(), "now": ROOT}
    costs: dict[str, list[Cost]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = make_toy_model(root / "model", seed=1)
        task = make_toy_task(root / "data", seed=1, train_rows=64, eval_rows=8, sft_rows=8)
        words = [f"model.path={model}", f"data.train={task.train}", "data.eval=null", *(overrides or [])]
        for repeat in range(repeats + 1):
            for tree, path in trees.items():
                scratch = root / f"{tree}_{repeat}"
                scratch.mkdir()
                cost = start_once(path, words, scratch)
                costs[tree] += [cost] if repeat else []
                shown = ", ".join(f"{what} {seconds:.1f}" for what, seconds in sorted(cost.by_process.items()))
                print(
                    f"{tree:7} ready {cost.ready_s:.1f} s, wall {cost.wall_s:.1f} s, CPU {cost.cpu_s:.1f} s  ({shown})",
                    flush=True,
                )
    checks = []
    for what in ("ready_s", "wall_s", "cpu_s"):
        then, now = (statistics.median(getattr(cost, what) for cost in costs[tree]) for tree in trees)
        checks.append(Check(f"{what} {now:.1f} / {then:.1f} = {now / then:.2f} (at most {MAX_RATIO})", now <= MAX_RATIO * then))
    for check in checks:
        print(f"{'holds ' if check.holds else 'MISSED'}  {check.text}")
    raise typer.Exit(0 if all(check.holds for check in checks) else 1)


if __name__ == "__main__":
    typer.run(main)
