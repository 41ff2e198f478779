"""Methods against each other under stale rollouts, on the quickstart's model and task (configs/ablation.yaml).

    python tools/ablate.py                                     every method, three seeds, into runs/ablation
    python tools/ablate.py --methods ctpo,grpo --seeds 1       some of it
    python tools/ablate.py --out runs/longer train.steps=16    overrides go to every `ctpo train`

A seed has its own data, model and cold start, which all methods share. Every method is a `ctpo train` of its own in
OUT/seed-SEED/METHOD, one at a time. Runs that ended, well or with an error, are not repeated: after an interruption the same
command goes on. Delete a run's directory to repeat it. docs/ablation.md says how to read the result.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from scipy.stats import t as student

from ctpo_megatron.record import write_summary

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, Any]] = {  # options of algorithm.objective; what is not given has its default
    "ctpo": {"type": "ctpo"},
    # ratios of 0.5 to 5 at every position, and the dual clip at the upper bound, as in the default
    "ctpo-window": {"type": "ctpo", "power": 0, "clip_low": 0.693, "clip_high": 1.609, "dual_clip": 1.609},
    "ctpo-power-0": {"type": "ctpo", "power": 0},
    "ctpo-power-1": {"type": "ctpo", "power": 1},
    "grpo": {"type": "grpo"},
    "gspo": {"type": "gspo"},
    "sequence": {"type": "sequence"},
    "minpro": {"type": "minpro"},
    "cppo": {"type": "cppo"},
}
REFERENCE = "ctpo"  # what the others' differences are taken from
FALL = 0.1  # of the mean reward from one rollout batch to the next that counts as a fall
MOST_SEEDS = 10
RUN_FAILED = 1  # exit code of `ctpo`; all others but 0 say nothing about the method
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#4d4d4d", "#cc79a7", "#e69f00", "#882255", "#999933")


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value for every `ctpo train`")] = None,
    methods: Annotated[str, typer.Option(help="some of them, with commas")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(min=1, max=MOST_SEEDS, help="1 to this number")] = 3,
    out: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/ablation"),
    report_only: Annotated[bool, typer.Option("--report-only", help="start nothing; report on the runs that ended")] = False,
) -> None:
    """Run what is missing, print the tables, write results.json, results.md and (where matplotlib is installed) ablation.png."""
    chosen = methods.split(",")
    if unknown := set(chosen) - set(METHODS):
        print(f"error: no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}", file=sys.stderr)
        raise typer.Exit(2)
    places = {seed: out / f"seed-{seed}" for seed in range(1, seeds + 1)}
    for seed, place in places.items():
        if report_only:
            break
        cold_start(place, seed)
        for method in chosen:
            train(place, method, seed, overrides or [])
    every = [(place / method, method, seed) for seed, place in places.items() for method in chosen]
    runs = [read_run(*each) for each in every if ended(each[0])]
    result = {"overrides": overrides or [], "runs": runs, "methods": {name: over_seeds(name, runs) for name in chosen}}
    write_summary(out, result, name="results.json")
    (out / "results.md").write_text(text := tables(result), encoding="utf-8")
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    else:
        plot(result, out / "ablation.png")
    print(out / "results.json")


def cold_start(place: Path, seed: int) -> None:
    """Data, model and supervised training of a seed, unless they are there. Ends the program where that fails."""
    data, base, sft = place / "data", place / "base", place / "sft"
    if (sft / "summary.json").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    paths = (f"run_dir={sft}", f"model.path={base}", f"data.train={data}/sft.parquet")
    for words in (
        (ROOT / "tools" / "make_toy_data.py", data, "--seed", seed, "--train-rows", 4000, "--eval-rows", 512),
        (ROOT / "tools" / "make_toy_model.py", base, "--seed", seed),
        ("-m", "ctpo_megatron.cli", "sft", ROOT / "configs" / "quickstart_sft.yaml", f"seed={seed}", *paths),
    ):
        if code := python(words, place / "cold_start.txt"):
            give_up(place / "cold_start.txt", code)


def train(place: Path, method: str, seed: int, overrides: Sequence[str]) -> None:
    """One `ctpo train`, unless it is done. A run that failed leaves error.txt; anything else ends the program."""
    run_dir = place / method
    if ended(run_dir):
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir()
    begun, output = time.monotonic(), run_dir / "output.txt"
    code = python(train_words(place, method, seed, overrides), output)
    if code not in (0, RUN_FAILED):
        give_up(output, code)
    message = ""
    if code:
        message = error_message(output.read_text())
        (run_dir / "error.txt").write_text(message + "\n")
    print(f"seed {seed}  {method}  {time.monotonic() - begun:.0f} s  {message}", flush=True)


def ended(run_dir: Path) -> bool:
    """Whether a run came to its end, well or with an error."""
    return (run_dir / "summary.json").is_file() or (run_dir / "error.txt").is_file()


def train_words(place: Path, method: str, seed: int, overrides: Sequence[str]) -> list[str]:
    """Arguments of Python for one run. The method comes last: no override changes it."""
    config = ROOT / "configs" / "ablation.yaml"
    paths = [f"run_dir={place / method}", f"model.path={place}/sft/model"]
    paths += [f"data.{split}={place}/data/{split}.parquet" for split in ("train", "eval")]
    options = [f"algorithm.objective.{key}={value}" for key, value in METHODS[method].items()]
    return ["-m", "ctpo_megatron.cli", "train", str(config), *overrides, f"seed={seed}", *paths, *options]


def python(words: Iterable[object], output: Path) -> int:
    """Exit code of a Python program whose output goes to the end of a file."""
    with output.open("a") as sink:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=sink, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except KeyboardInterrupt:  # it got the signal too, and ends its own processes first
            return process.wait()


def give_up(output: Path, code: int) -> None:
    """End with the exit code of a program that could not do its part."""
    print(f"{error_message(output.read_text())}\nexit code {code}; all output: {output}", file=sys.stderr)
    raise typer.Exit(code if code > 0 else 1)


def error_message(output: str) -> str:
    """The error that `ctpo` ended with, or else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


def read_run(run_dir: Path, method: str, seed: int) -> dict[str, Any]:
    """What one run comes to. A run that failed has an `error`, no accuracy afterwards, and numbers of the steps before."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").is_file() else []
    records = [json.loads(line) for line in lines]
    steps = [{key: float(value) for key, value in record.items()} for record in records if "reward/mean" in record]
    accuracy = {record["step"]: float(record["eval/accuracy"]) for record in records if "eval/accuracy" in record}
    failed = (run_dir / "error.txt").is_file()
    rewards = [step["reward/mean"] for step in steps]
    found = {"method": method, "seed": seed, "error": (run_dir / "error.txt").read_text().strip() if failed else None}
    found |= {"accuracy_before": accuracy.get(0), "accuracy_after": None, "rewards": rewards, "falls": falls(rewards)}
    if not failed:
        found["accuracy_after"] = accuracy[max(accuracy)]
    found["changes"] = max(len(rewards) - 1, 0)
    if steps:
        found["reward_area"] = statistics.fmean(rewards)
        found["grad_norm_max"] = max(step["train/grad_norm"] for step in steps)
        found["clip_fraction"] = statistics.fmean(step["train/clip_fraction"] for step in steps)
        found["log_ratio_max"] = max(largest_log_ratio(step) for step in steps)
        found["kl_max"] = max(step["train/kl_old"] for step in steps)
    return found


def falls(rewards: Sequence[float]) -> int:
    """How often the mean reward fell by more than FALL from one rollout batch to the next."""
    return sum(before - after > FALL for before, after in pairwise(rewards))


def largest_log_ratio(step: dict[str, float]) -> float:
    """The largest |log| of any ratio in a step, as the method itself forms its ratios; infinite where one was 0."""
    low, high = step["train/ratio_min"], step["train/ratio_max"]
    return max(math.log(high), -math.log(low) if low > 0 else math.inf)


def over_seeds(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's numbers over its runs, and its differences from the reference at the same seed."""
    own = [run for run in runs if run["method"] == method]
    reference = {run["seed"]: run for run in runs if run["method"] == REFERENCE}

    def values(key: str) -> list[float]:
        return [run[key] for run in own if run.get(key) is not None]

    def differences(key: str) -> list[float]:
        pairs = [(run.get(key), reference.get(run["seed"], {}).get(key)) for run in own]
        return [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]

    keys = ("accuracy_before", "accuracy_after", "reward_area", "grad_norm_max", "clip_fraction", "log_ratio_max", "kl_max")
    found = {key: spread(values(key)) for key in keys}
    if method != REFERENCE:
        found |= {f"{key}_difference": spread(differences(key)) for key in ("accuracy_after", "reward_area")}
    found |= {"falls": sum(run["falls"] for run in own), "changes": sum(run["changes"] for run in own)}
    return found | {"errors": sum(run["error"] is not None for run in own), "runs": len(own)}


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, extremes, and half the width of Student's 95 % interval of the mean; None where there are too few values."""
    if not values:
        return {"n": 0, "mean": None, "min": None, "max": None, "half_width": None}
    half = None
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"n": len(values), "mean": statistics.fmean(values), "min": min(values), "max": max(values), "half_width": half}


def tables(result: dict[str, Any]) -> str:
    """What was learned and how steadily, as Markdown. Accuracies, rewards and fractions are in per cent."""
    columns = ("accuracy_before", "accuracy_after", "accuracy_after_difference", "reward_area", "reward_area_difference")
    less = f"less {REFERENCE}'s"
    learned = [("method", "runs", "accuracy before", "accuracy after", less, "mean reward", less)]
    steady = [
        ("method", "errors", "largest gradient norm", f"falls by {100 * FALL:.0f}", "clipped", "largest log-ratio", "largest KL")
    ]
    for name, row in result["methods"].items():
        learned.append((name, str(row["runs"]), *(cell(row.get(key), signed=key.endswith("difference")) for key in columns)))
        norm, ratio, kl = (number(row[key]["max"]) for key in ("grad_norm_max", "log_ratio_max", "kl_max"))
        clipped = "" if row["clip_fraction"]["mean"] is None else f"{100 * row['clip_fraction']['mean']:.1f}"
        steady.append((name, str(row["errors"]), norm, f"{row['falls']} of {row['changes']}", clipped, ratio, kl))
    return f"{markdown(learned)}\n{markdown(steady)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head, with columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Two significant digits, nothing where there is no number."""
    return "" if value is None else f"{value:.2g}"


def cell(found: dict[str, Any] | None, *, signed: bool = False) -> str:
    """Mean ± half of the 95 % interval (smallest to largest), in per cent; a single value alone."""
    if not found or not found["n"]:
        return ""
    form = "{:+.1f}" if signed else "{:.1f}"
    mean, low, high = (form.format(100 * found[key]) for key in ("mean", "min", "max"))
    return mean if found["n"] == 1 else f"{mean} ± {100 * found['half_width']:.1f} ({low} to {high})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Left every run's reward by rollout batch, a panel per method; below all methods' held-out accuracy."""
    from matplotlib.figure import Figure

    names = list(result["methods"])
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9, 2.2 * rows + 3), layout="constrained")
    panels = figure.subplot_mosaic(
        [[*names[r * columns :][:columns], *["."] * columns][:columns] for r in range(rows)] + [["accuracy"] * columns]
    )
    bottom = panels["accuracy"]
    for number, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        own, panel = [run for run in result["runs"] if run["method"] == name], panels[name]
        for run in own:
            panel.plot(range(1, len(run["rewards"]) + 1), run["rewards"], color=colour, lw=1)
        panel.set(title=name, ylim=(0, 1))
        found = result["methods"][name]["accuracy_after"]
        after = [run["accuracy_after"] for run in own if run["accuracy_after"] is not None]
        bottom.plot([number] * len(after), after, "o", color=colour, ms=4)
        if found["n"]:
            bottom.errorbar(number + 0.15, found["mean"], found["half_width"] or 0, fmt="_", color=colour, capsize=3)
    bottom.set_xticks(range(len(names)), names, rotation=20)
    bottom.set(ylabel="held-out accuracy, 95 %", ylim=(0, 1))
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.supylabel("mean reward by rollout batch")
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    typer.run(main)
