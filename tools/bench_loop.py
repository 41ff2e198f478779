"""The whole loop on CPUs against TRL's: tokens sampled and trained on per second, from the same weights and prompts.

    python tools/bench_loop.py                         both sizes; about ten minutes on two quiet cores
    python tools/bench_loop.py --size small            0.46 M parameters, 29 tokens; or large: 4.9 M, up to 384 tokens
    python tools/bench_loop.py --environment DIR       where TRL's environment is, or is made; by default in a temporary directory

Each iteration samples 128 answers in groups of 8 and makes 4 optimizer steps: `ctpo train`, and TRL's GRPOTrainer with
transformers' generate, without a reference policy. TRL has an environment of its own, with TRL at a pinned version and, besides,
this environment's packages: torch and transformers are the same. The first iteration of each run does not count. Ends with exit
code 1, and says which, where a bound is missed. Compare ratios, not seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task

TOOLS = Path(__file__).resolve().parent
PINNED = ("trl==1.16.0", "accelerate==1.15.0")
LIMIT_S = 1800.0  # of one run


class Size(NamedTuple):
    """What is trained, and how many times TRL's tokens per second are wanted."""

    hidden: int
    layers: int
    ffn: int
    max_tokens: int
    wanted: float
    iterations: int


SIZES = {"small": Size(128, 2, 384, 29, 1.2, 8), "large": Size(256, 6, 768, 384, 3.0, 4)}


def environment(directory: Path) -> Path:
    """The Python of TRL's environment in `directory`, made where it is not there."""
    python = directory / "bin" / "python"
    if not (directory / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
        Path(paths["purelib"], "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINNED], check=True)
        (directory / "ready").write_text("\n".join(PINNED))
    return python


def run_ours(size: Size, model: Path, data: Path, scratch: Path) -> float:
    """Tokens per second of `ctpo train`: the median over its iterations but the first."""
    run_dir = scratch / "run"
    settings = [
        *(f"run_dir={run_dir}", f"model.path={model}", f"data.train={data}", "data.eval=null"),
        *(f"train.steps={size.iterations}", "train.prompts_per_step=16", "rollout.group_size=8", "train.optimizer_steps=4"),
        *("rollout.tool=null", "rollout.max_turns=1", f"rollout.max_response_tokens={size.max_tokens}"),
        *("rollout.reward.type=function", "rollout.reward.function=bench_loop_reward:reward"),
        *(
            "optimizer.lr=1e-5",
            "optimizer.schedule=constant",
            "rollout.engine.max_total_tokens=131072",
            "checkpoint.export=false",
        ),
    ]
    config = TOOLS.parent / "configs" / "quickstart.yaml"
    called([sys.executable, "-m", "ctpo_megatron.cli", "train", str(config), *settings], scratch / "ours.log")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step" in row]
    return statistics.median(128 * step["rollout/sampled_tokens"] / step["time/step"] for step in steps[1:])


def run_trl(size: Size, model: Path, data: Path, scratch: Path, python: Path) -> float:
    """The same of TRL."""
    out = scratch / "trl.json"
    words = [str(python), str(TOOLS / "bench_loop_trl.py"), str(model), str(data), str(out)]
    called([*words, str(size.max_tokens), str(size.iterations)], scratch / "trl.log")
    found = json.loads(out.read_text())
    pairs = list(zip(found["tokens"], found["seconds"], strict=False))[1:]
    return statistics.median(tokens / seconds for tokens, seconds in pairs)


def called(command: list[str], log: Path) -> None:
    """Run a program to its end; its last words are shown where it fails."""
    path = os.pathsep.join(filter(None, [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH")]))
    with log.open("w") as sink:
        done = subprocess.run(
            command, stdout=sink, stderr=subprocess.STDOUT, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": path}
        )
    if done.returncode:
        print(log.read_text()[-4000:], file=sys.stderr)
        raise typer.Exit(done.returncode)


def main(
    size: Annotated[str, typer.Option(help="small, large or both")] = "both",
    repeats: Annotated[int, typer.Option(help="runs of each side, in turn")] = 1,
    trl: Annotated[Path | None, typer.Option("--environment", help="directory of TRL's environment")] = None,
) -> None:
    """Print the table and the bounds."""
    if size not in ("both", *SIZES):
        raise typer.BadParameter(f"--size {size}: allowed are both, {', '.join(SIZES)}")
    console, verdicts = Console(width=140), []
    table = Table("size", "ours, tokens/s", "TRL, tokens/s", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        python = environment(trl or Path(folder) / "trl")
        data = make_toy_task(Path(folder) / "data", seed=1, train_rows=1024, eval_rows=8, sft_rows=8)[0]
        for name in SIZES if size == "both" else (size,):
            chosen, ratios = SIZES[name], []
            model = make_toy_model(Path(folder) / name, seed=1, hidden=chosen.hidden, layers=chosen.layers, ffn=chosen.ffn)
            for _ in range(repeats):
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    ours = run_ours(chosen, model, data, Path(scratch))
                    theirs = run_trl(chosen, model, data, Path(scratch), python)
                ratios.append(ours / theirs)
                table.add_row(name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ratios[-1]:.2f}")
            ratio = statistics.median(ratios)
            verdicts.append((ratio >= chosen.wanted, f"{name}: {ratio:.2f} times TRL's tokens/s (at least {chosen.wanted})"))
    console.print(table)
    for holds, text in verdicts:
        console.print(f"{'holds ' if holds else 'MISSED'}  {text}")
    raise typer.Exit(0 if all(holds for holds, _ in verdicts) else 1)


if __name__ == "__main__":
    typer.run(main)
