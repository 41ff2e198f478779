"""How many tokens a server on CPUs and its controller sample, against an older build of this project, and where the time goes.

    python tools/bench_rollout.py                                  against 41666cf; 15 minutes on two free cores, 4 GB of memory
    python tools/bench_rollout.py --case tail-0.46M --repeats 1    one case
    python tools/bench_rollout.py --case short --run-dir runs/quickstart     the quickstart's own, after `make quickstart`
    python tools/bench_rollout.py --case tail-5M --option=--disable-radix-cache      what an option of SGLang's changes
    python tools/bench_rollout.py --json found.json                the numbers as a file too

Each side is a controller and servers of its own tree; the older one is a git worktree that the bench makes and removes. Rounds
take turns, and a ratio is the median of the ratios of neighbours. CPU time is counted by process: on a machine that does other
things too, it is the number to trust. Cases named `tail` sample from a model with random weights until it happens to end its
turn, once in 264 tokens: lengths are geometric, cut at 1,024. Ends with exit code 1 where a case has less than `--least` times
the tokens per second.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet
import typer
from commands import ROOT
from rich.console import Console
from rich.table import Table

from ctpo_megatron.toy.model import make_toy_model

BASE = "41666cf"
END_S = 60.0  # for a side to end
SIZES: dict[str, dict[str, Any]] = {"tail-0.46M": {}, "tail-5M": {"hidden": 256, "layers": 6, "ffn": 768}}
GROUPS = {"tail-0.46M": 32, "tail-5M": 16, "short": 32}  # of a round, 8 trajectories each
IN_FLIGHT = {"tail-0.46M": 64, "tail-5M": 64, "short": 256}  # fewer than there are: those in flight differ in length then
GROUP_SIZE = 8


@dataclass
class Side:
    """A tree's controller and server, and the rounds that they have played."""

    name: str
    process: subprocess.Popen[str]
    errors: Path
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, tree: Path, folder: Path, task: dict[str, Any]) -> Side:
        """A side that uses the code under `tree`; `folder` is its own."""
        folder.mkdir(parents=True)
        (folder / "task.json").write_text(json.dumps(task | {"folder": str(folder)}))
        command = [sys.executable, str(ROOT / "tools" / "bench_rollout_side.py"), str(folder / "task.json")]
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=tree,
                env=os.environ | {"PYTHONPATH": str(tree)},
            )
        return cls(name, process, folder / "errors")

    def hear(self) -> dict[str, Any]:
        """The next thing it says. Ends the bench where it has died."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            print(f"the side {self.name!r} has ended:\n{self.errors.read_text()[-3000:]}", file=sys.stderr)
            raise typer.Exit(1)
        return json.loads(line)

    def play(self, groups: int) -> dict[str, Any]:
        """One round."""
        if self.process.stdin:
            self.process.stdin.write(json.dumps({"groups": groups, "group_size": GROUP_SIZE}) + "\n")
            self.process.stdin.flush()
        return self.hear()

    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [each["tokens"] / each["seconds"] for each in self.rounds]

    def costs(self) -> list[float]:
        """Microseconds of CPU per token of each round, of all processes."""
        return [1e6 * sum(each["cpu"].values()) / each["tokens"] for each in self.rounds]

    def close(self) -> None:
        """End it, and its server with it."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of `commit`, until the context ends."""
    subprocess.run(["git", "worktree", "add", "--detach", "-f", folder, commit], cwd=ROOT, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=False, capture_output=True)


def make_task(case: str, folder: Path, run_dir: Path, options: list[str], servers: int, in_flight: int) -> dict[str, Any]:
    """What both sides are to sample."""
    rollout: dict[str, Any] = {
        "group_size": GROUP_SIZE,
        "concurrency": in_flight or IN_FLIGHT[case],
        "engine": {"extra_args": options, "servers": servers},
    }
    if case == "short":
        rows = pyarrow.parquet.read_table(run_dir / "data" / "train.parquet").to_pylist()[: GROUPS[case]]
        prompts = [{"messages": row["prompt"], "answer": row["reward_model"]["ground_truth"]} for row in rows]
        rollout |= {"max_turns": 3, "max_response_tokens": 96, "tool": {"type": "python", "fallback": "calculator"}}
        return {"model": str((run_dir / "sft" / "model").resolve()), "prompts": prompts, "rollout": rollout}
    model = make_toy_model(folder / f"model-{case}", seed=1, **SIZES[case])
    prompts = [{"messages": [{"role": "user", "content": f"{n} * {n}?"}], "answer": str(n * n)} for n in range(GROUPS[case])]
    rollout |= {"max_turns": 1, "max_response_tokens": 1024, "tool": None}
    return {"model": str(model), "prompts": prompts, "rollout": rollout}


def compare(case: str, sides: list[Side], repeats: int) -> None:
    """Play rounds in turn, after one short one that is not counted."""
    for side in sides:
        side.hear()
    for side in sides:
        side.play(2)
    for number in range(repeats):
        for side in sides if number % 2 == 0 else sides[::-1]:
            side.rounds.append(side.play(GROUPS[case]))
            print(f"{case}, round {number}, {side.name}: {side.rates()[-1]:.0f} tokens/s", file=sys.stderr, flush=True)


def row(case: str, sides: list[Side]) -> dict[str, Any]:
    """The figures of a case."""
    base, now = sides
    ratios = [ours / theirs for ours, theirs in zip(now.rates(), base.rates(), strict=True)]
    savings = [theirs / ours for ours, theirs in zip(now.costs(), base.costs(), strict=True)]
    found: dict[str, Any] = {"case": case, "ratio": statistics.median(ratios), "ratios": ratios}
    found |= {"cpu ratio": statistics.median(savings), "cpu ratios": savings}
    for side in sides:
        kinds = sorted({kind for each in side.rounds for kind in each["cpu"]})
        shares = {kind: sum(each["cpu"].get(kind, 0.0) for each in side.rounds) for kind in kinds}
        found[side.name] = {
            "tokens/s": statistics.median(side.rates()),
            "cpu us/token": statistics.median(side.costs()),
            "cpu shares": {kind: seconds / sum(shares.values()) for kind, seconds in shares.items()},
            "lengths": side.rounds[-1]["lengths"],
        }
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures."""
    table = Table(
        "case", "build", "tokens/s", "ratio", "CPU us/token", "ratio", "where CPU time goes", "least, median, most tokens"
    )
    for each in rows:
        for build in ("older", "this"):
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in each[build]["cpu shares"].items() if share > 0.005)
            ratios = [
                f"{min(found):.2f} {statistics.median(found):.2f} {max(found):.2f}"
                for found in (each["ratios"], each["cpu ratios"])
            ]
            rate, cost = (f"{each[build][name]:,.0f}" for name in ("tokens/s", "cpu us/token"))
            first, second = ratios if build == "this" else ("", "")
            table.add_row(each["case"], build, rate, first, cost, second, shares, str(each[build]["lengths"]))
    Console(width=200).print(table)


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(GROUPS)}; may be given more than once")] = None,
    repeats: Annotated[int, typer.Option(help="rounds of each side", min=1)] = 3,
    commit: Annotated[str, typer.Option(help="the older build")] = BASE,
    run_dir: Annotated[Path, typer.Option(help="of a finished quickstart, for the case `short`")] = ROOT / "runs" / "quickstart",
    option: Annotated[list[str] | None, typer.Option(help="of SGLang's, for this build only")] = None,
    servers: Annotated[int, typer.Option(help="of this build; the older one has one", min=1)] = 1,
    in_flight: Annotated[int, typer.Option(help="trajectories; 0: 64, in the case `short` 256", min=0)] = 0,
    least: Annotated[float, typer.Option(help="times the older build's tokens per second, in every case")] = 0.0,
    file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Compare the two builds."""
    cases = case or [name for name in GROUPS if name != "short" or run_dir.exists()]
    if unknown := set(cases) - set(GROUPS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(GROUPS)}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch, checkout(commit, Path(scratch) / "older") as older:
        for name in cases:
            folder, sides = Path(scratch) / name, []
            try:
                for side, tree, options, count in (("older", older, [], 1), ("this", ROOT, option or [], servers)):
                    task = make_task(name, folder, run_dir, options, count, in_flight)
                    sides.append(Side.start(side, tree, folder / side, task))
                compare(name, sides, repeats)
            finally:
                for each in sides:
                    each.close()
            rows.append(row(name, sides))
    show(rows)
    if file is not None:
        file.write_text(json.dumps(rows, indent=2))
    if missed := [each["case"] for each in rows if each["ratio"] < least]:
        print(f"less than {least} times: {', '.join(missed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
