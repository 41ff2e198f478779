"""Every example for a few steps: what was started, how far it came, what its rewards were, how it ended. Then rewards that fail.

Each is the command of a user, `ctpo train examples/NAME.yaml`, with toy models in place of the ones that it names, whose cold
starts are short. A run that ends otherwise than expected is shown so, and makes the exit code 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from commands import ROOT, python
from examples_judge import Fault, judging
from rich.console import Console
from rich.table import Table

LIMIT_S = 1800.0  # of one command
NOBODY = "http://127.0.0.1:9/v1"  # where no judge is
SHARED = (
    "data.eval=null",
    "train.prompts_per_step=8",
    "train.optimizer_steps=1",
    "rollout.group_size=4",
    "checkpoint.export=false",
)
FAULTY = ("rollout.failed_window=32", "rollout.retries=0")
RUNS = "{runs}"  # in changes: the directory of all runs
GOES_ON, ENDS_EARLY = 0, 1  # exit codes


@dataclass(frozen=True)
class Case:
    """One run: the configuration, what is changed in it, and the exit code that it should have.

    `model`: the cold start that it begins with. `judge`: the fault of its judge and the share of answers that it strikes; None:
    it has no judge.
    """

    config: str
    model: str
    changes: tuple[str, ...] = ()
    judge: tuple[Fault, float] | None = None
    code: int = GOES_ON

    def changed(self, runs: Path) -> list[str]:
        """Returns what is changed, where all runs are in the directory `runs`."""
        return [each.replace(RUNS, str(runs)) for each in self.changes]


def _sums(kind: str = "train") -> tuple[str, ...]:
    return (f"data.train={RUNS}/sums/data/{kind}.parquet",)


def _function(name: str, *changes: str, code: int = GOES_ON) -> Case:
    reward = f"rollout.reward={{type: function, function: 'examples_rewards:{name}', timeout_s: 1, memory_mb: 1024}}"
    return Case("function.yaml", "sums", (*_sums(), reward, *FAULTY, *changes), None, code)


def _judge(fault: Fault | None, share: float, *changes: str, code: int = GOES_ON) -> Case:
    quick = ("rollout.reward.timeout_s=2", "rollout.reward.retries=0")
    return Case("judge.yaml", "sums", (*_sums(), *quick, *FAULTY, *changes), (fault, share) if fault else None, code)


EXAMPLES = {
    "math": Case("math.yaml", "sums", _sums()),
    "tool": Case("tool.yaml", "quickstart"),
    "notebook": Case("notebook.yaml", "quickstart"),
    "code": Case("code.yaml", "sums", _sums("code")),
    "function": Case("function.yaml", "sums", _sums()),
    "combination": Case("combination.yaml", "sums", _sums()),
    "judge": Case("judge.yaml", "sums", _sums(), ("none", 0.0)),
    "guess": Case("guess.yaml", "guess"),
    "any_agent": Case("any_agent.yaml", "sums", _sums()),
    "quickstart_agent": Case("../configs/quickstart_agent.yaml", "calls", ("rollout.agent.workers=1",)),
}
WIDE, NARROW = "rollout.undecided_share=0.9", "rollout.undecided_share=0.1"
FAULTS = {
    "judge has no room, a quarter of the time": _judge("error", 0.25, "rollout.failed_share=0.9"),
    "judge slow, a quarter of the time": _judge("slow", 0.25, "rollout.failed_share=0.9"),
    "judge talks nonsense, a quarter": _judge("nonsense", 0.25, WIDE),
    "function raises, a quarter": _function("raises", WIDE),
    "function hangs, a quarter": _function("hangs", WIDE),
    "function eats memory, a quarter": _function("eats", WIDE),
    "judge down": _judge(None, 1.0, f"rollout.reward.url={NOBODY}", "rollout.failed_share=0.1", code=ENDS_EARLY),
    "judge slow": _judge("slow", 1.0, "rollout.failed_share=0.1", code=ENDS_EARLY),
    "judge talks nonsense": _judge("nonsense", 1.0, NARROW, code=ENDS_EARLY),
    "function raises": _function("always_raises", NARROW, code=ENDS_EARLY),
}


@dataclass
class Came:
    """What a run came to."""

    name: str
    command: str
    wanted: int
    code: int = 0
    seconds: float = 0.0
    steps: int = 0
    rewards: list[float] = field(default_factory=list)
    undecided: int = 0
    failed: int = 0
    said: str = ""  # the error that ended it

    @property
    def as_expected(self) -> bool:
        """Whether it ended as it should, and made steps where it should go on."""
        return self.code == self.wanted and (self.steps > 0 or self.code != GOES_ON)


def main(
    steps: Annotated[int, typer.Option(min=1, help="of each run")] = 3,
    run_dir: Annotated[Path, typer.Option(help="where everything is written; models there are used again")] = Path(
        "runs/examples"
    ),
    only: Annotated[list[str] | None, typer.Option(help="names of runs; default: all")] = None,
    faults: Annotated[bool, typer.Option(help="rewards that fail too")] = True,
) -> None:
    """Run them one after the other; exit code 0 where all ended as expected."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended too
    cases = EXAMPLES | (FAULTS if faults else {})
    unknown = set(only or ()) - set(cases)
    if unknown:
        print(f"error: no run is called {', '.join(sorted(unknown))}; there are {', '.join(cases)}", file=sys.stderr)
        raise typer.Exit(2)
    chosen = {name: case for name, case in cases.items() if not only or name in only}
    run_dir = run_dir.absolute()
    for model in dict.fromkeys(case.model for case in chosen.values()):
        prepare(model, run_dir / model)
    came = []
    for name, case in chosen.items():
        came.append(run(name, case, run_dir, steps))
        (run_dir / "results.md").write_text(markdown(came), encoding="utf-8")
    show(came)
    print(f"the same as a page: {run_dir / 'results.md'}")
    if not all(each.as_expected for each in came):
        raise typer.Exit(1)


def prepare(model: str, directory: Path) -> None:
    """Make data, a toy model and a short cold start for the runs that begin with `model`, unless they are there."""
    if (directory / "sft" / "model").exists():
        return
    data, base, tools = directory / "data", directory / "base", ROOT / "tools"
    calls = ["--calls"] if model == "calls" else []
    if model in ("quickstart", "calls"):
        python(tools / "make_toy_data.py", data, "--train-rows", 4000, "--eval-rows", 128, *calls, limit_s=LIMIT_S)
    else:
        python(ROOT / "examples" / f"{model}.py", data, limit_s=LIMIT_S)
    python(tools / "make_toy_model.py", base, *calls, limit_s=LIMIT_S)
    config = {"quickstart": "configs/quickstart_sft.yaml", "calls": "configs/quickstart_agent_sft.yaml"}
    where = ROOT / config.get(model, f"examples/{model}_sft.yaml")
    words = (f"run_dir={directory / 'sft'}", f"model.path={base}", f"data.train={data / 'sft.parquet'}", "sft.steps=200")
    python("-m", "ctpo_megatron.cli", "sft", where, *words, limit_s=LIMIT_S)


def run(name: str, case: Case, runs: Path, steps: int) -> Came:
    """Train one example for so many steps; returns what came of it."""
    directory = runs / "of" / name.replace(" ", "_").replace(",", "")
    told = [f"run_dir={directory}", f"model.path={runs / case.model / 'sft' / 'model'}", f"train.steps={steps}", *SHARED]
    told += [f"data.train={runs / case.model / 'data' / 'train.parquet'}", *case.changed(runs)]
    begun = time.monotonic()
    with judging(*case.judge) if case.judge else nullcontext() as url:
        words = [*told, *([f"rollout.reward.url={url}"] if url else [])]
        command = [sys.executable, "-m", "ctpo_megatron.cli", "train", str(ROOT / "examples" / case.config), *words]
        print(f"\n$ PYTHONPATH=.:tools {' '.join(['ctpo', *command[3:]])}", flush=True)
        code = _ended(command)
    shown = f"ctpo train {'configs/' if '..' in case.config else 'examples/'}{Path(case.config).name}"
    came = Came(name, shown, case.code, code, time.monotonic() - begun)
    return collect(came, directory)


def _ended(command: list[str]) -> int:
    """Returns the exit code of a command that finds examples and this tool's rewards; 124 where it took longer than it may."""
    places = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with _process(command, os.environ | {"PYTHONPATH": os.pathsep.join(places)}) as process:
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return 124


@contextmanager
def _process(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=env, cwd=ROOT)
    try:
        yield process
    finally:
        for insist in (process.terminate, process.kill):
            if process.poll() is None:
                insist()
                try:
                    process.wait(120)
                except subprocess.TimeoutExpired:
                    continue
        process.wait()


def collect(came: Came, directory: Path) -> Came:
    """Returns `came` with what its run directory says: steps, rewards, what was undecided or failed, and the error."""
    metrics, ledger, error = (directory / name for name in ("metrics.jsonl", "ledger.jsonl", "logs/error.log"))
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    trained = [row for row in rows if "reward/mean" in row]
    came.steps, came.rewards = len(trained), [row["reward/mean"] for row in trained]
    came.undecided = int(sum(row["reward/undecided"] for row in trained))
    groups = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    came.failed = sum(group.get("end") == "failed" for group in groups)
    if came.code and error.exists():
        # tracebacks, each with its time as the last line
        said = [line.strip() for line in error.read_text(encoding="utf-8").splitlines() if line.strip() and line[:4] != "--- "]
        came.said = said[-1] if said else ""
    return came


def _cells(each: Came) -> tuple[str, ...]:
    rewards = f"{each.rewards[0]:.2f} to {each.rewards[-1]:.2f}" if each.rewards else ""
    wrong = "" if each.as_expected else f" (expected {each.wanted})"
    counts = (str(each.steps), rewards, str(each.undecided), str(each.failed))
    return each.name, each.command, *counts, f"{each.code}{wrong}", f"{each.seconds:.0f}"


HEADS = ("run", "started", "steps", "reward, first to last", "undecided answers", "failed groups", "exit code", "s")


def show(came: list[Came]) -> None:
    """Print the table."""
    table = Table(*HEADS, title="examples")
    for each in came:
        table.add_row(*_cells(each))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for each in came:
        if each.said:
            print(f"{each.name}: {each.said}")


def markdown(came: list[Came]) -> str:
    """Returns the table as a page, with what ended those that ended early."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADS, ["---"] * len(HEADS), *map(_cells, came))]
    return "\n".join([*lines, "", *(f"- {each.name}: {each.said}" for each in came if each.said), ""])


if __name__ == "__main__":
    typer.run(main)
