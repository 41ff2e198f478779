"""Kills the driver of a run at random moments, again and again, and shows that nothing came of it.

    python tools/kill_driver.py                                  a random toy model: 20 kills, about ten minutes on two cores
    python tools/kill_driver.py --kills 4 --steps 4              two minutes
    python tools/kill_driver.py -- model.path=runs/quickstart/sft/model data.train=runs/quickstart/data/train.parquet \\
        data.eval=runs/quickstart/data/eval.parquet              after `make quickstart`: a model that uses its tool

`ctpo train --resume auto` is started, killed (SIGKILL, at a seeded moment of a start, a rollout, training, publishing, an
evaluation, a save or the end), and started again when all that it had started is gone, until it has come through. Sampling on
servers cannot be repeated, so what an uninterrupted run would have been is asked like this: a second run is given the journal of
the first one, and nothing else, and is left alone. Both have to end with the same weights, bit for bit. Ends with exit code 1,
and says which, when something does not hold. docs/operations.md has a run's figures.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import psutil
import typer
from bench_loss import Check
from commands import ROOT
from kill_driver_moments import Moment, Progress, draw, kinds
from leftovers import living
from rich.console import Console
from rich.table import Table
from run_ledger import Sizes, same_run, sampled_once, trained_once

from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task

POLL_S = 0.02
GONE_S = 60.0  # for what a driver leaves behind to end by itself
START_S = 300.0  # for a moment to come
GONE_WITHIN_S = 30.0  # is asked of it


@dataclass(frozen=True)
class Kill:
    """One kill: meant for `moment`; what the run directory showed when it came, `after_s` seconds after the start."""

    moment: str
    shown: str
    after_s: float
    gone_s: float  # until all that the driver had started was gone
    left: tuple[str, ...]  # processes that were not, and were ended


class Runs:
    """Starts one configuration in a directory again and again."""

    def __init__(self, directory: Path, config: Path, overrides: list[str]) -> None:
        self.directory, self._config, self._overrides = directory, config, overrides

    @contextlib.contextmanager
    def started(self, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The command, in a session of its own; what it prints is added to RUN_DIR.txt. Nothing of it is left afterwards."""
        words = [sys.executable, "-m", "ctpo_megatron.cli", "train", str(self._config), *self._overrides]
        words += [f"run_dir={run_dir}", "--resume", "auto"]
        with run_dir.with_suffix(".txt").open("ab") as sink:
            process = subprocess.Popen(words, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                end(process)

    def to_its_end(self, run_dir: Path, limit_s: float) -> float:
        """Start it and leave it alone. Returns the seconds that it took; ends this program where it fails."""
        begun = time.monotonic()
        with self.started(run_dir) as process:
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                fail(run_dir, f"the run has not ended within {limit_s:.0f} s")
        if code:
            fail(run_dir, f"the run ended with exit code {code}")
        return time.monotonic() - begun


def fail(run_dir: Path, words: str) -> NoReturn:
    """Say what has happened, with the end of what the run has printed."""
    printed = run_dir.with_suffix(".txt").read_text(errors="replace").splitlines()[-40:]
    print("\n".join([*printed, f"MISSED  {words}; {run_dir} is kept"]), file=sys.stderr)
    raise typer.Exit(1)


def end(process: subprocess.Popen[bytes]) -> tuple[float, tuple[str, ...]]:
    """Kill a driver. Returns the seconds until all below it were gone, and what was not and had to be killed too."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    killed = time.monotonic()
    left = living(below, GONE_S)
    seconds, names = time.monotonic() - killed, []
    for each in left:
        names.append(_name(each))
        each.kill()
    living(left)
    return seconds, tuple(names)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:100] or process.name()
    except psutil.Error:
        return f"process {process.pid}"


def strike(runs: Runs, run_dir: Path, moment: Moment, sizes: Sizes) -> Kill | None:
    """Start the run and kill its driver at `moment`; None where the run has come to its end before."""
    begun = time.time()
    with runs.started(run_dir) as process:
        progress = Progress(run_dir, sizes, begun)
        if not wait_for(moment, process, progress):
            if process.poll():
                fail(run_dir, f"before {moment} the run ended with exit code {process.returncode}")
            if process.poll() is None:
                fail(run_dir, f"{moment} did not come within {START_S:.0f} s")
            return None
        after, shown = time.time() - begun, progress.shown()  # before: a rank may still complete a checkpoint
        gone_s, left = end(process)
    return Kill(str(moment), shown, after, gone_s, left)


def wait_for(moment: Moment, process: subprocess.Popen[bytes], progress: Progress) -> bool:
    """Returns whether `moment` has come; False where the process ended before, or it took too long."""
    begun, opened = time.monotonic(), None
    while process.poll() is None and time.monotonic() - begun < START_S:
        progress.look()
        if opened is None and progress.opened(moment):
            opened = time.monotonic()
        if progress.passed(moment) or (opened is not None and time.monotonic() - opened >= progress.waits_s(moment)):
            return True
        time.sleep(POLL_S)
    return False


def table(kills: list[Kill]) -> Table:
    """A line for each kill."""
    shown = Table("", "meant for", "met", "s after the start", "gone after s", title="Kills of the driver")
    for number, each in enumerate(kills, 1):
        shown.add_row(str(number), each.moment, each.shown, f"{each.after_s:.1f}", f"{each.gone_s:.1f}")
    return shown


def toy(directory: Path) -> list[str]:
    """A random model and the toy task. It earns no reward: a reference that pulls gives gradients that depend on the samples."""
    task = make_toy_task(directory / "data", seed=1, train_rows=1024, eval_rows=32, sft_rows=64)
    model = make_toy_model(directory / "model", "qwen3", seed=1, init_std=0.2)
    pull = ["algorithm.reference.coeff=0.5", "optimizer.lr=0.02", "optimizer.weight_decay=1.0", "eval.temperature=1.0"]
    return [f"model.path={model}", f"data.train={task.train}", f"data.eval={task.eval}", *pull]


def checks(kills: list[Kill], wanted: int, killed: Path, straight: Path, sizes: Sizes) -> list[Check]:
    """All that has to hold."""
    left, slowest = [name for each in kills for name in each.left], max((each.gone_s for each in kills), default=0.0)
    gone = f"all that a driver had started was gone after {slowest:.1f} s at the latest (at most {GONE_WITHIN_S:.0f})"
    return [
        Check(f"{len(kills)} of {wanted} kills came", len(kills) == wanted),
        Check(f"{gone}, left: {left or 'none'}", not left and slowest <= GONE_WITHIN_S),
        *trained_once(killed, sizes),
        *sampled_once(killed),
        *same_run(killed, straight),
    ]


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value; a model and data, else toys")] = None,
    config: Annotated[Path, typer.Option(help="YAML file of the run")] = ROOT / "configs" / "quickstart.yaml",
    kills: Annotated[int, typer.Option(min=0)] = 20,
    seed: Annotated[int, typer.Option(help="of the moments")] = 1,
    steps: Annotated[int, typer.Option(min=2)] = 10,
    every: Annotated[int, typer.Option(min=1, help="steps between checkpoints, and between evaluations")] = 2,
    groups: Annotated[int, typer.Option(min=1, help="prompts a step")] = 8,
    attempts: Annotated[int, typer.Option(min=2, help="at each prompt")] = 4,
    directory: Annotated[Path, typer.Option(help="for both runs; must not be there")] = Path("runs/kill_driver"),
    json_file: Annotated[Path | None, typer.Option("--json", help="write the kills here")] = None,
) -> None:
    """Kill, go on, compare; print a table and the bounds."""
    if directory.exists():
        print(f"error: {directory} exists; delete it, or give another --directory", file=sys.stderr)
        raise typer.Exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    directory = directory.absolute()
    directory.mkdir(parents=True)
    sizes, given = Sizes(steps, groups, attempts), overrides or []
    if not any(each.startswith("model.path=") for each in given):
        given = [*toy(directory), *given]
    plan = [f"train.steps={steps}", f"train.prompts_per_step={groups}", f"rollout.group_size={attempts}"]
    plan += ["train.optimizer_steps=2", "eval.prompts=8", f"eval.every={every}", f"checkpoint.every={every}"]
    runs = Runs(directory, config, [*plan, *given, "checkpoint.journal=all"])
    killed, straight, begun = directory / "killed", directory / "straight", time.monotonic()
    made: list[Kill] = []
    for number, moment in enumerate(draw(kills, seed, steps, evaluate=every, save=every), 1):
        kill = strike(runs, killed, moment, sizes)
        if kill is None:
            break
        made.append(kill)
        print(
            f"{time.monotonic() - begun:5.0f} s  kill {number}, {moment}: {kill.shown}; gone in {kill.gone_s:.1f} s", flush=True
        )
    limit_s = START_S + 60.0 * steps
    last_s = runs.to_its_end(killed, limit_s)
    shutil.copytree(killed / "journal", straight / "journal")
    straight_s = runs.to_its_end(straight, limit_s)
    if json_file:
        json_file.write_text(json.dumps([asdict(each) for each in made], indent=1))
    Console(width=150).print(table(made))
    met = ", ".join(f"{name} {count}" for name, count in kinds([each.shown for each in made]).items())
    print(
        f"met: {met}; {time.monotonic() - begun:.0f} s in all, the last start {last_s:.0f} s, the second run {straight_s:.0f} s"
    )
    found = checks(made, kills, killed, straight, sizes)
    for check in found:
        print(f"{'holds ' if check.holds else 'MISSED'}  {check.text}")
    raise typer.Exit(0 if all(check.holds for check in found) else 1)


if __name__ == "__main__":
    typer.run(main)
