"""The whole loop on one machine: data, a model, a cold start, evaluation, reinforcement learning, a table of what happened.

Every step is the command a user would type; this only calls them in order and stops at the first that fails.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from commands import ROOT, ctpo, python
from rich.console import Console
from rich.table import Table


def main(
    seed: Annotated[int, typer.Option(help="of data, model and training")] = 1,
    run_dir: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/quickstart"),
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value for `ctpo train`")] = None,
) -> None:
    """Run the quickstart; exit code 0 when every step succeeded."""
    play("quickstart", seed, run_dir, overrides or [])


def play(name: str, seed: int, run_dir: Path, overrides: list[str], *words: str) -> None:
    """Make data and a model with the options `words`, start it cold, evaluate and train it: configs/NAME_sft.yaml, NAME.yaml."""
    begun = time.monotonic()
    if run_dir.exists():
        if not (run_dir / "data" / "sft.parquet").is_file():
            print(f"error: {run_dir} exists and is not of an earlier {name}; give another --run-dir", file=sys.stderr)
            raise typer.Exit(2)
        shutil.rmtree(run_dir)
    data, base, sft = run_dir / "data", run_dir / "base", run_dir / "sft"
    common = [f"seed={seed}"]
    python(ROOT / "tools" / "make_toy_data.py", data, "--seed", seed, "--train-rows", 4000, "--eval-rows", 256, *words)
    python(ROOT / "tools" / "make_toy_model.py", base, "--seed", seed, *words)
    ctpo("sft", f"{name}_sft.yaml", *common, f"run_dir={sft}", f"model.path={base}", f"data.train={data}/sft.parquet")
    paths = (f"model.path={sft}/model", f"data.eval={data}/eval.parquet")
    ctpo("eval", f"{name}.yaml", *common, f"run_dir={run_dir}/eval", *paths)
    started = time.monotonic()
    ctpo("train", f"{name}.yaml", *common, f"run_dir={run_dir}", *overrides)
    show(run_dir, name, train_s=time.monotonic() - started, wall_s=time.monotonic() - begun)


def show(run_dir: Path, name: str, *, train_s: float, wall_s: float) -> None:
    """The table at the end."""
    summary = json.loads((run_dir / "summary.json").read_text())
    last = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tool = [row["tool/rate"] for row in last if "tool/rate" in row]
    seconds = summary["step_seconds"]
    table = Table(title=f"{name}, seed {summary['seed']}", show_header=False)
    table.add_row("accuracy before", f"{summary['accuracy_before']:.1%}")
    table.add_row("accuracy after", f"[bold]{summary['accuracy_after']:.1%}[/bold]")
    table.add_row("tool-call rate, first and last step", f"{tool[0]:.0%}  {tool[-1]:.0%}")
    table.add_row("rollout tokens/s", f"{summary['rollout_tokens_per_s']:,.0f}")
    table.add_row("training tokens/s", f"{summary['train_tokens_per_s']:,.0f}")
    table.add_row("seconds per step", "  ".join(f"{phase} {value:.1f}" for phase, value in seconds.items()))
    table.add_row("largest log-prob drift", f"{summary['mismatch_max']:.1e}")
    table.add_row("wall time", f"ctpo train {train_s:.0f} s, everything {wall_s:.0f} s")
    console = Console()
    console.print(table)
    console.print(f"scalars: tensorboard --logdir {run_dir / 'tb'}   trajectories: {run_dir / 'rollouts'}")


if __name__ == "__main__":
    typer.run(main)
