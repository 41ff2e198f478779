"""What came of `make example`: figures from the files of its run, with intervals, as JSON, on the console and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

WANTED_RISE = 0.15  # that remains when the rise's interval is taken off
LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """A share of right answers, with its interval (Wilson's)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[float]) -> Share:
        """The share of `outcomes`, each 0 or 1."""
        from scipy.stats import binomtest

        right = int(sum(outcomes))
        bounds = binomtest(right, len(outcomes)).proportion_ci(LEVEL, method="wilson")
        return cls(right / len(outcomes), float(bounds.low), float(bounds.high))

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Rise:
    """How much more is answered right on the same prompts, in shares of 1, with the interval of paired differences (t)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Rise:
        """The mean of the differences."""
        from scipy.stats import t

        differences = np.subtract(after, before)
        mean, count = float(differences.mean()), len(differences)
        half = float(t.ppf((1 + LEVEL) / 2, count - 1) * differences.std(ddof=1) / np.sqrt(count))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} points ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class KindResult:
    """One kind of problem: how many prompts it has, and the shares of them that were right."""

    kind: str
    prompts: int
    before: float
    after: float


@dataclass(frozen=True)
class Results:
    """The figures. Seconds are wall time; those of a step are means over all steps, by phase."""

    seed: int
    steps: int
    samples: int  # that were trained on
    prompts: int  # held out
    before: Share
    after: Share
    rise: Rise
    kinds: list[KindResult]
    reward_first: float  # mean reward of the samples of the first step
    reward_last: float
    drift_mean: float  # largest of any step, nats
    drift_max: float
    answers: int  # compared with transformers
    same_answers: int
    step_seconds: dict[str, float]
    stage_seconds: dict[str, float]

    @property
    def reached(self) -> bool:
        """Whether what was wanted came about."""
        return self.rise.low >= WANTED_RISE and self.same_answers == self.answers


def collect(run_dir: Path, seed: int, stage_seconds: Mapping[str, float]) -> Results:
    """The results of a finished run, from its files."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if "reward/mean" in row]
    summary = json.loads((run_dir / "summary.json").read_text())
    same = json.loads((run_dir / "same_answers.json").read_text())
    kinds = _kinds(run_dir / "data" / "eval.parquet")
    before, after = (rewards(run_dir, step) for step in (0, summary["steps"]))
    if len(before) != len(after):
        raise ValueError(f"{run_dir}: {len(before)} held-out prompts before training, {len(after)} after it")
    return Results(
        seed=seed,
        steps=summary["steps"],
        samples=sum(_lines(run_dir / "rollouts" / f"step_{step + 1:08d}.jsonl") for step in range(summary["steps"])),
        prompts=len(after),
        before=Share.of(list(before.values())),
        after=Share.of(list(after.values())),
        rise=Rise.of(list(before.values()), [after[index] for index in before]),
        kinds=[_of_kind(kind, kinds, before, after) for kind in dict.fromkeys(sorted(kinds))],
        reward_first=steps[0]["reward/mean"],
        reward_last=steps[-1]["reward/mean"],
        drift_mean=max(row.get("drift/mean", 0.0) for row in steps),
        drift_max=max(row.get("drift/max", 0.0) for row in steps),
        answers=same["answers"],
        same_answers=same["same"],
        step_seconds={phase: float(np.mean([row[f"time/{phase}"] for row in steps])) for phase in PHASES},
        stage_seconds=dict(stage_seconds),
    )


PHASES = ("rollout", "train", "publish", "step")


def rewards(run_dir: Path, step: int) -> dict[int, float]:
    """Reward by index of the held-out prompt, of the evaluation after `step` training steps."""
    rows = (json.loads(line) for line in evaluation_file(run_dir, step).read_text(encoding="utf-8").splitlines())
    return {row["prompt_index"]: row["reward"] for row in rows}


def evaluation_file(run_dir: Path, step: int) -> Path:
    """Where an evaluation's trajectories are."""
    return run_dir / "rollouts" / f"eval_{step:08d}.jsonl"


def _kinds(prompts: Path) -> list[str]:
    import pyarrow.parquet as pq

    sources: list[str] = pq.read_table(prompts, columns=["data_source"])["data_source"].to_pylist()
    return [source.rpartition("/")[2] for source in sources]


def _of_kind(kind: str, kinds: Sequence[str], before: Mapping[int, float], after: Mapping[int, float]) -> KindResult:
    mine = [index for index in before if kinds[index] == kind]
    count = max(len(mine), 1)
    return KindResult(kind, len(mine), sum(before[i] for i in mine) / count, sum(after[i] for i in mine) / count)


def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def table_rows(results: Results) -> list[tuple[str, str]]:
    """What each figure is called, and the figure."""
    return [
        ("seed", str(results.seed)),
        ("held-out prompts", str(results.prompts)),
        ("accuracy after the cold start (95 %)", str(results.before)),
        ("accuracy after reinforcement learning (95 %)", str(results.after)),
        ("rise on the same prompts (95 %)", str(results.rise)),
        ("steps, samples", f"{results.steps}, {results.samples:,}"),
        ("mean reward of a step's samples, first and last", f"{results.reward_first:.2f}, {results.reward_last:.2f}"),
        (
            "trainer against engine, log-prob per token, mean and largest",
            f"{results.drift_mean:.0e}, {results.drift_max:.0e} nats",
        ),
        ("exported model in transformers, same answers", f"{results.same_answers} of {results.answers}"),
        ("seconds per step", ", ".join(f"{phase} {value:.0f}" for phase, value in results.step_seconds.items())),
        ("minutes", ", ".join(f"{stage} {value / 60:.1f}" for stage, value in results.stage_seconds.items())),
        ("minutes in all", f"{sum(results.stage_seconds.values()) / 60:.0f}"),
    ]


def as_markdown(results: Results) -> str:
    """Two tables: the figures, and what became of each kind of problem."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {figure} |" for name, figure in table_rows(results))]
    lines += ["", "| kind | prompts | before | after |", "|---|---|---|---|"]
    lines += [f"| {each.kind} | {each.prompts} | {each.before:.0%} | {each.after:.0%} |" for each in results.kinds]
    return "\n".join(lines) + "\n"


def write(run_dir: Path, results: Results) -> None:
    """Write results.json and results.md, and show the figures."""
    plain: dict[str, Any] = asdict(results) | {"wanted_rise": WANTED_RISE, "reached": results.reached}
    (run_dir / "results.json").write_text(json.dumps(plain, indent=2) + "\n")
    (run_dir / "results.md").write_text(as_markdown(results))
    table = Table(title="SmolLM2-135M-Instruct on word problems", show_header=False)
    for row in table_rows(results):
        table.add_row(*row)
    Console().print(table)
