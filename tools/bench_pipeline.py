"""Trained tokens per hour of whole runs: this build with rollouts that overlap training, against an older one without.

    python tools/bench_pipeline.py                          against 3e1eaec; 15 minutes on two free cores, 3 GB of memory
    python tools/bench_pipeline.py --way staleness-1 --way partial      which part of the gain is whose
    python tools/bench_pipeline.py --groups 16 --steps 8    larger steps, less idle at their ends, longer
    python tools/bench_pipeline.py --json found.json        the numbers as a file too
    python tools/bench_pipeline.py --keep DIR               run directories stay there, for `ctpo plan --simulate --with run=`

Each run is `ctpo train` in a tree of its own; the older one is a git worktree that the bench makes and removes. The model has 5
million parameters; its turns end by chance after 250 tokens on average, so lengths are geometric, cut at 1,024 (`toy.chain`). Its
learning rate is 0: all steps are alike. Counted are the tokens that the policy wrote and that were trained on, from the end of
step `--warm` to that of the last step but `--warm`: rollouts run ahead at the beginning, and nothing is begun near the end.
Ends with exit code 1 where a way has less than `--least` times the older build's tokens per hour.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow
import pyarrow.parquet
import typer
from bench_rollout import checkout
from commands import ROOT
from rich.console import Console
from rich.table import Table

from ctpo_megatron.toy.chain import Chain, make_chain_model

BASE = "3e1eaec"
GROUP_SIZE, LONGEST, MEAN_TURN = 8, 1024, 250
SIZES: dict[str, Any] = {"hidden": 256, "layers": 6, "ffn": 768}
PROMPTS = 512
LIMIT_S = 1800.0  # for one run
PHASES = ("rollout", "train", "publish")


@dataclass(frozen=True)
class Way:
    """How rollouts and training go together; `oversample` in steps' worth of groups."""

    staleness: int
    oversample: float = 0.0

    def words(self, groups: int) -> list[str]:
        """Overrides of `ctpo train`."""
        more = [f"train.oversample={round(self.oversample * groups)}"] if self.oversample else []
        return [f"train.staleness={self.staleness}", *more]


WAYS = {
    "synchronous": Way(0),
    "staleness-1": Way(1),
    "partial": Way(1, 1.0),
    "partial-half": Way(1, 0.5),
    "partial-2": Way(2, 1.0),
}


def name_plugins(tree: Path) -> None:
    """Let servers of the older build find their plugin, which they look for among installed packages."""
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=tree, check=True, capture_output=True)


@dataclass(frozen=True)
class Sizes:
    """Of a run: groups of a step, steps, and how many of these at each end are not counted."""

    groups: int
    steps: int
    warm: int


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Write the model and the prompts that all runs share; returns where they are."""
    model = make_chain_model(folder / "model", Chain(MEAN_TURN), **SIZES)
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}?"}], "reward_model": {"ground_truth": "42", "style": "rule"}}
        for n in range(PROMPTS)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")
    return model, folder / "prompts.parquet"


def words_of(way: Way, sizes: Sizes, model: Path, prompts: Path, run_dir: Path) -> list[str]:
    """The overrides of the quickstart's configuration that both builds know."""
    return [
        *(f"run_dir={run_dir}", f"model.path={model}", f"data.train={prompts}", "data.eval=null", "optimizer.lr=0"),
        *(f"train.steps={sizes.steps}", f"train.prompts_per_step={sizes.groups}", "train.optimizer_steps=1"),
        *(f"rollout.group_size={GROUP_SIZE}", f"rollout.max_response_tokens={LONGEST}", "rollout.max_turns=1"),
        *("rollout.tool=null", f"rollout.concurrency={4 * sizes.groups * GROUP_SIZE}", "checkpoint.export=false"),
        *way.words(sizes.groups),
    ]


def run(tree: Path, way: Way, sizes: Sizes, inputs: tuple[Path, Path], run_dir: Path) -> dict[str, Any]:
    """One run of `ctpo train` in `tree`; returns its figures. Ends the bench where it fails."""
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-m", "ctpo_megatron.cli", "train", str(tree / "configs" / "quickstart.yaml")]
    log = run_dir / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *words_of(way, sizes, *inputs, run_dir)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )
        try:
            code = process.wait(LIMIT_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        print(f"`ctpo train` in {tree} ended with exit code {code}:\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise typer.Exit(1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return figures([each for each in rows if "time/train" in each], sizes)


def figures(rows: Sequence[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """The figures of a run, from its lines of metrics.jsonl, one for each step."""
    counted = rows[sizes.warm : len(rows) - sizes.warm]
    seconds = counted[-1]["time"] - rows[sizes.warm - 1]["time"]
    tokens = sum(each["rollout/sampled_tokens"] for each in counted) * sizes.groups * GROUP_SIZE
    pauses = [each["publish/paused"] for each in counted]
    return {
        "tokens/h": 3600 * tokens / seconds,
        "seconds": [later["time"] - before["time"] for before, later in pairwise(rows)],
        "lengths": [each["rollout/sampled_tokens"] for each in rows],
        "phases": {phase: statistics.fmean(each[f"time/{phase}"] for each in counted) for phase in PHASES},
        "pause": [statistics.fmean(pauses), max(pauses)],
        "publication": statistics.fmean(each["publish/total"] for each in counted),
        "staleness": [
            statistics.fmean(each["rollout/staleness_mean"] for each in counted),
            max(each["rollout/staleness_max"] for each in counted),
        ],
    }


def show(found: dict[str, list[dict[str, Any]]], older: str) -> None:
    """Print the figures."""
    table = Table(
        "run", "trained tokens/h", "ratio", "s per step: waiting for rollouts, training, publishing", "pause, most", "age, most"
    )
    for name, runs in found.items():
        ratios = ratios_of(runs, found[older])
        phases = [statistics.fmean(each["phases"][phase] for each in runs) for phase in PHASES]
        pause, most = (statistics.fmean(each["pause"][place] for each in runs) for place in (0, 1))
        age, oldest = runs[-1]["staleness"]
        table.add_row(
            name,
            f"{statistics.median(each['tokens/h'] for each in runs):,.0f}",
            "" if name == older else " ".join(f"{each:.2f}" for each in ratios),
            "  ".join(f"{each:.2f}" for each in phases),
            f"{pause:.3f} {most:.3f} s",
            f"{age:.2f} {oldest:.0f}",
        )
    Console(width=160).print(table)


def ratios_of(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[float]:
    """Tokens per hour over those of the older build's run of the same round."""
    return [each["tokens/h"] / before["tokens/h"] for each, before in zip(runs, base, strict=True)]


def main(
    way: Annotated[list[str] | None, typer.Option(help=f"of this build, more than once: {', '.join(WAYS)}")] = None,
    groups: Annotated[int, typer.Option(help="of a step, 8 trajectories each", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="of each run", min=3)] = 10,
    warm: Annotated[int, typer.Option(help="steps at each end that are not counted", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="of all runs, in turn", min=1)] = 1,
    commit: Annotated[str, typer.Option(help="the older build")] = BASE,
    older_way: Annotated[str, typer.Option(help="how the older build is run")] = "synchronous",
    least: Annotated[float, typer.Option(help="times the older build's tokens per hour")] = 1.5,
    file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
    keep: Annotated[Path | None, typer.Option(help="where run directories, model and prompts stay; it must be empty")] = None,
) -> None:
    """Compare the two builds."""
    ways = way or ["partial"]
    if unknown := {*ways, older_way} - set(WAYS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(WAYS)}")
    if steps <= 2 * warm:
        raise typer.BadParameter(f"{steps} steps, of which {2 * warm} are not counted", param_hint="--steps")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a run is ended with the bench
    sizes, older = Sizes(groups, steps, warm), f"older, {older_way}"
    found: dict[str, list[dict[str, Any]]] = {older: [], **{f"this, {each}": [] for each in ways}}
    if keep is not None and keep.is_dir() and any(keep.iterdir()):
        raise typer.BadParameter(f"{keep} is not empty", param_hint="--keep")
    with tempfile.TemporaryDirectory() as scratch, checkout(commit, Path(scratch) / "older") as tree:
        name_plugins(tree)
        place = (keep or Path(scratch)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        inputs = make_inputs(place)
        for number in range(rounds):
            for name in found if number % 2 == 0 else reversed(found):
                build, chosen = name.split(", ")
                begun, busy = time.monotonic(), psutil.cpu_percent()
                made = run(tree if build == "older" else ROOT, WAYS[chosen], sizes, inputs, place / f"{name} {number}")
                found[name].append(made)
                busy = psutil.cpu_percent()
                took = time.monotonic() - begun
                print(
                    f"{name}: {made['tokens/h']:,.0f} tokens/h, {took:.0f} s, host {busy:.0f} % busy", file=sys.stderr, flush=True
                )
                with contextlib.suppress(OSError):
                    if file is not None:
                        file.write_text(json.dumps(found, indent=2))
    show(found, older)
    slow = [name for name, runs in found.items() if name != older and statistics.median(ratios_of(runs, found[older])) < least]
    if slow:
        print(f"less than {least:g} times: {'; '.join(slow)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
