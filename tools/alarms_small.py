"""Writes the second table of docs/alarms.md: what alarms say of small policies that are really trained, well and badly.

.venv/bin/python tools/alarms_small.py [--seeds 3] [--healthy 10]
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from alarms_table import PAGE, put, raised_in, words_of
from small_runs import ANSWERS, GROUPS, Setting, run

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.record.alarms.kinds import Measure

STEPS, KEPT = 200, 120
BEGIN, END = "<!-- table: small runs -->", "<!-- end of small runs -->"
MEASURE = Measure(GROUPS, ANSWERS, "reward/term/answer")
HEALTHY = Setting("healthy")
FAULTS = [  # with the alarms that are to tell of it, and the harm in words
    (Setting("learning rate 75 times as high", lr_then=0.15, begin=60), ("entropy",)),
    (
        Setting("a reward that pays as much for length as for answers", pay_length=1.0, begin=60),
        ("length", "format"),
    ),
    (Setting("a grader with 0.2 % more answers without a verdict at each step", undecided=0.002, begin=60), ("undecided",)),
]


def harm(setting: Setting, rows: list[dict[str, float]]) -> int | None:
    """Returns the step from which on there is harm: accuracy (median of 3 evaluations) 5 points below its best.

    Of a broken grader: a tenth of the answers without a verdict.
    """
    if setting.undecided:
        return setting.begin + round(0.1 / setting.undecided)
    evaluated = [(int(row["step"]), row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    smooth = [
        (step, statistics.median(value for _, value in evaluated[max(0, n - 2) : n + 1])) for n, (step, _) in enumerate(evaluated)
    ]
    best = [max(value for _, value in smooth[: n + 1]) for n in range(len(smooth))]
    return next((step for n, (step, now) in enumerate(smooth) if step > setting.begin and now < best[n] - 0.05), None)


def table(seeds: int, healthy: int, keep: Path | None) -> list[str]:
    """Returns the lines of the table. `keep`: a directory for the rows of the first seeds."""
    config = AlarmsConfig()
    lines = [
        "| fault, from step 60 on | alarm | steps to the alarm | steps to the harm | others raised |",
        "|---|---|---|---|---|",
    ]
    for setting, alarms in FAULTS:
        told, harms, others = [], [], set()
        for seed in range(1, seeds + 1):
            rows = run(setting, seed, STEPS)
            raised = raised_in(rows, config, MEASURE)
            told.append(next((each.step - setting.begin for each in raised if each.alarm in alarms), None))
            at = harm(setting, rows)
            harms.append(None if at is None else at - setting.begin)
            others |= {each.alarm for each in raised} - set(alarms)
            if keep is not None and seed == 1:
                write(keep / f"small_{alarms[0]}.jsonl", rows)
        shown = [", ".join("never" if each is None else str(each) for each in found) for found in (told, harms)]
        lines.append(f"| {setting.name} | {' or '.join(alarms)} | {shown[0]} | {shown[1]} | {', '.join(sorted(others))} |")
    found = [raised_in(run(HEALTHY, seed, STEPS), config, MEASURE) for seed in range(1, healthy + 1)]
    return [*lines, "", f"False alarms on {healthy} healthy runs of {STEPS} steps: {words_of(found)}."]


def write(path: Path, rows: list[dict[str, float]]) -> None:
    """Keep what most alarms look at, of the first steps, in three digits."""
    names = ("step", "time", "eval/", "reward/", "rollout/", "train/entropy", "health/effective")
    kept = [{name: float(f"{value:.3g}") for name, value in row.items() if name.startswith(names)} for row in rows[:KEPT]]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def main(
    seeds: Annotated[int, typer.Option(help="of each fault")] = 3,
    healthy: Annotated[int, typer.Option(help="healthy runs")] = 10,
    keep: Annotated[Path | None, typer.Option(help="directory for the rows of each fault's first run")] = None,
) -> None:
    """Train, and put the table into the page."""
    torch.set_num_threads(1)
    lines = table(seeds, healthy, keep)
    print("\n".join(lines))
    put(PAGE, BEGIN, END, lines)


if __name__ == "__main__":
    typer.run(main)
