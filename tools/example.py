"""A real language model on this machine: SmolLM2-135M-Instruct learns word problems. docs/example.md tells the story.

Every stage is a command that a user could type. The same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from commands import ROOT, ctpo, python
from example_results import collect, evaluation_file, write
from smollm2 import CACHE

STAGE_LIMIT_S = 3600.0
STATE = "example.json"


def main(
    seed: Annotated[int, typer.Option(help="of data and training")] = 1,
    run_dir: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/smollm2"),
    cache: Annotated[Path, typer.Option(help="where the package with the model is kept")] = CACHE,
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value for `ctpo train`")] = None,
) -> None:
    """Run the example; exit code 0 when every stage succeeded and the accuracy rose by as much as it should."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended too
    stages = Stages(run_dir, {"seed": seed, "overrides": overrides or []})
    tools, common = ROOT / "tools", f"seed={seed}"
    base, data, sft = run_dir / "base", run_dir / "data", run_dir / "sft"
    cold_start = (common, f"run_dir={sft}", f"model.path={base}", f"data.train={data}/sft.parquet")
    stages.run("model", lambda: python(tools / "smollm2.py", base, "--cache", cache, limit_s=STAGE_LIMIT_S))
    stages.run("data", lambda: python(tools / "word_problems.py", data, "--seed", seed, limit_s=STAGE_LIMIT_S))
    stages.run("sft", lambda: ctpo("sft", "smollm2_sft.yaml", *cold_start, limit_s=STAGE_LIMIT_S))
    stages.run("train", lambda: train(run_dir, common, *(overrides or [])))
    stages.run("check", lambda: check(run_dir))
    results = collect(run_dir, seed, stages.seconds)
    write(run_dir, results)
    print(f"scalars: tensorboard --logdir {run_dir / 'tb'}   trajectories: {run_dir / 'rollouts'}   tables: {run_dir}/results.md")
    if not results.reached:
        print("error: the accuracy did not rise by 15 points beyond the interval of its rise", file=sys.stderr)
        raise typer.Exit(1)


class Stages:
    """The stages of a run that are done, and the seconds that they took, interrupted attempts included.

    Raises typer.Exit(2) where `run_dir` is something else's, or was made with other `settings`.
    """

    def __init__(self, run_dir: Path, settings: dict[str, object]) -> None:
        self._file = run_dir / STATE
        self._settings = settings
        self.done: list[str] = []
        self.seconds: dict[str, float] = {}
        if self._file.is_file():
            earlier = json.loads(self._file.read_text())
            if earlier["settings"] != settings:
                self._refuse(f"{run_dir} was made with {earlier['settings']}, and this is {settings}")
            self.done, self.seconds = earlier["done"], earlier["seconds"]
        elif run_dir.exists():
            self._refuse(f"{run_dir} exists and is not of an earlier example")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._save()

    def run(self, name: str, stage: Callable[[], None]) -> None:
        """Run a stage, unless an earlier run has finished it."""
        if name in self.done:
            print(f"\n{name}: done by an earlier run, in {self.seconds[name]:.0f} s", flush=True)
            return
        begun = time.monotonic()
        try:
            stage()
            self.done.append(name)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            self._save()
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

    def _refuse(self, why: str) -> None:
        print(f"error: {why}; give another --run-dir, or remove it", file=sys.stderr)
        raise typer.Exit(2)

    def _save(self) -> None:
        state = {"settings": self._settings, "done": self.done, "seconds": self.seconds}
        self._file.write_text(json.dumps(state, indent=2) + "\n")


def train(run_dir: Path, *overrides: str) -> None:
    """Reinforcement learning, from where an earlier start was interrupted."""
    ctpo("train", "smollm2.yaml", *overrides, f"run_dir={run_dir}", "--resume", "auto", limit_s=STAGE_LIMIT_S)


def check(run_dir: Path) -> None:
    """The exported model against the answers of the last evaluation, in plain transformers."""
    last = json.loads((run_dir / "summary.json").read_text())["steps"]
    words = (run_dir / "model", evaluation_file(run_dir, last), "--out", run_dir / "same_answers.json")
    python(ROOT / "tools" / "same_answers.py", *words, limit_s=STAGE_LIMIT_S)


if __name__ == "__main__":
    typer.run(main)
