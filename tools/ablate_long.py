"""Methods against each other under stale rollouts on trajectories of hundreds of tokens, without servers.

    python tools/ablate_long.py                            everything, into runs/ablation_long; again to go on where it stopped
    python tools/ablate_long.py --workers 2                two runs at a time, a thread each
    python tools/ablate_long.py --report-only              tables of what has ended, into OUT/results.md
    python tools/ablate_long.py --methods ctpo,grpo --seeds 5

The policy is a small recurrent net and the task a machine whose states it has to track (ablate_long_world.py); the loss is the
project's (ablate_long_run.py). Every method is tuned alike: the rates in GRID on TUNING_SEEDS, and further rates while the best
one is at an edge. Its test runs have the best rate and other seeds. Each run that ended is one line in OUT/runs.jsonl and is not
repeated. docs/ablation.md says how to read the result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from ablate_long_report import best_rate, report
from ablate_long_run import Job, Size, make_cold_start, run
from ablate_long_world import length_of

from ctpo_megatron.config.objectives import CtpoObjective

GRID = (-8, -7, -6)  # a rate is 10 ** (exponent / 2)
FARTHEST = 2  # further rates on either side, at most
TUNING_SEEDS = (1001, 1002)
TEST_SEEDS = 8
PAPER = CtpoObjective()


def window(power: float, length: int) -> dict[str, Any]:
    """CTPO with bounds that grow as position ** `power`, as wide as the paper's on average over `length` positions."""

    def mean(exponent: float) -> float:
        return sum(place**exponent for place in range(1, length + 1)) / length

    scale = mean(PAPER.power) / mean(power)
    assert PAPER.dual_clip is not None
    bounds = {"clip_low": PAPER.clip_low * scale, "clip_high": PAPER.clip_high * scale, "dual_clip": PAPER.dual_clip * scale}
    return {"type": "ctpo", "power": power, **bounds}


def methods_for(length: int) -> dict[str, dict[str, Any]]:
    """Options of algorithm.objective by method, for trajectories of `length` tokens; what is not given has its default."""
    return {
        "ctpo": {"type": "ctpo"},
        "ctpo-constant": window(0, length),
        "ctpo-linear": window(1, length),
        # ratios of 0.5 to 5 at every position, as in the ablation of short trajectories
        "ctpo-window": {"type": "ctpo", "power": 0, "clip_low": 0.693, "clip_high": 1.609, "dual_clip": 1.609},
        "grpo": {"type": "grpo"},
        "gspo": {"type": "gspo"},
        "sequence": {"type": "sequence"},
        "cppo": {"type": "cppo"},
        "reinforce": {"type": "reinforce"},
    }


def main(
    methods: Annotated[str, typer.Option(help="some of them, with commas; all if empty")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="test seeds, 1 to this number")] = TEST_SEEDS,
    out: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/ablation_long"),
    batches: Annotated[int, typer.Option(min=1, help="rollout batches of a run")] = Size.batches,
    workers: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help="start nothing; tables of the runs that ended")] = False,
) -> None:
    """Run what is missing, print the tables and write OUT/results.md."""
    size = Size(batches=batches, probes=(max(1, batches // 4), max(1, 3 * batches // 4)))
    known = methods_for(length_of(size.blocks))
    chosen = methods.split(",") if methods else list(known)
    if unknown := set(chosen) - set(known):
        print(f"error: no method {', '.join(sorted(unknown))}; there are {', '.join(known)}", file=sys.stderr)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    if not report_only:
        sweep({name: known[name] for name in chosen}, range(1, seeds + 1), size, out, workers)
    text = report(read_lines(out / "runs.jsonl"), chosen)
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)


def sweep(methods: dict[str, dict[str, Any]], seeds: Sequence[int], size: Size, out: Path, workers: int) -> None:
    """Run what is missing until nothing is: first the cold starts, then what `wanted` names. Refuses lines of another size."""
    said = out / "size.json"
    if said.is_file() and json.loads(said.read_text()) != json.loads(json.dumps(asdict(size))):
        print(f"error: the runs in {out} are of another size, see {said}; give another --out", file=sys.stderr)
        raise typer.Exit(2)
    said.write_text(json.dumps(asdict(size), indent=1))
    mend(out / "runs.jsonl")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            missing = [seed for seed in (*TUNING_SEEDS, *seeds) if not cold_file(out, seed).is_file()]
            for future in as_completed([pool.submit(make_cold_start, seed, size, cold_file(out, seed)) for seed in missing]):
                future.result()
            while jobs := wanted(list(methods), seeds, read_lines(out / "runs.jsonl")):
                started = {pool.submit(run, job, methods[job.method], size, cold_file(out, job.seed)): job for job in jobs}
                for each in as_completed(started):
                    append(out / "runs.jsonl", each.result() | {"batches": size.batches, "optimizer_steps": size.optimizer_steps})
                    print(f"{started[each].key}  reward {each.result()['final']:.3f}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cold_file(out: Path, seed: int) -> Path:
    """Where a seed's cold start is."""
    return out / f"cold-{seed}.pt"


def wanted(methods: Sequence[str], seeds: Sequence[int], lines: Sequence[dict[str, Any]]) -> list[Job]:
    """The runs that can begin now: those of tuning first, then test runs of methods whose tuning is over, seed after seed."""
    done = {job_of(line).key for line in lines}
    missing = {}
    for method in methods:
        tuning = [Job(method, rate, seed, "tune") for rate in rates_of(method, lines) for seed in TUNING_SEEDS]
        missing[method] = [job for job in tuning if job.key not in done]
    rates = {method: best_rate(lines, method) for method in methods if not missing[method]}
    test = [Job(method, rate, seed, "test") for seed in seeds for method, rate in rates.items() if rate is not None]
    return [job for jobs in missing.values() for job in jobs] + [job for job in test if job.key not in done]


def rates_of(method: str, lines: Sequence[dict[str, Any]]) -> list[float]:
    """The rates to be tried on a method: GRID, and beyond an edge as long as the best so far is there, FARTHEST at most."""
    low, high = GRID[0], GRID[-1]
    tried = {line["rate"] for line in lines if (line["method"], line["purpose"]) == (method, "tune")}
    while all(rate_at(exponent) in tried for exponent in range(low, high + 1)):
        inside = [line for line in lines if line["rate"] in {rate_at(exponent) for exponent in range(low, high + 1)}]
        best = best_rate(inside, method)
        if best == rate_at(low) and low > GRID[0] - FARTHEST:
            low -= 1
        elif best == rate_at(high) and high < GRID[-1] + FARTHEST:
            high += 1
        else:
            break
    return [rate_at(exponent) for exponent in range(low, high + 1)]


def rate_at(exponent: int) -> float:
    """A learning rate, two digits of it."""
    return float(f"{10 ** (exponent / 2):.1e}")


def job_of(line: dict[str, Any]) -> Job:
    """The run that a line is of."""
    return Job(*(line[name] for name in Job._fields))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The runs that ended. A last line that is not whole, being written or left by an interruption, is passed over."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def mend(file: Path) -> None:
    """Cut off the file what an interruption left of a last line. For the one who writes it."""
    if file.is_file():
        whole = file.read_bytes()
        os.truncate(file, whole.rfind(b"\n") + 1)


def append(file: Path, line: dict[str, Any]) -> None:
    """Write a line, on the disk before the next run begins."""
    with file.open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(line) + "\n")
        sink.flush()
        os.fsync(sink.fileno())


if __name__ == "__main__":
    typer.run(main)
