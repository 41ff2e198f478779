"""Speeds that were measured in a run: from its servers' logs, its metrics and its trajectories. Its step times are not looked at.

servers     SGLang logs every 40th decoding step: requests running, tokens in the cache, tokens per second since the line before;
            and every batch of prompts. The seconds between two lines are fitted to what was done between them
trainer     time/train of each step, over the tokens that it trained on
publication publish/total and publish/paused
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.simulation.lines import read_lines
from ctpo_megatron.simulation.speeds import ServerSpeed, Speeds, TrainerSpeed

LOGGED_STEPS = 40  # SGLang's --decode-log-interval
SPREAD = 1.5  # of the tokens of training steps, that tells what an optimizer step takes without any
FEWEST_STEPS = 4  # for that
MOST_REQUESTS = 32  # whose decoding takes at most as long as the pass as such
MOST_TOKENS = 4096  # in the cache, the same
LARGE = 256  # tokens of a batch of prompts whose reading takes longer than the pass as such
LEAST_STEP_S = 1e-4  # of a decoding step
FEWEST = 8  # lines to fit a server's speed to
WARM_UP = 1  # training steps that are left out: the first one allocates and compiles

STAMP = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\]")
DECODE = re.compile(r"Decode batch.*?#running-req: (\d+), #token: (\d+),.*?gen throughput \(token/s\): ([\d.]+)")
PREFILL = re.compile(
    r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+),.*?#running-req: (\d+).*?input throughput \(token/s\): ([\d.]+)"
)
BOUNDS = ("cache_tokens", "max_prefill_tokens", "max_running")
CACHE = re.compile(r"max_total_num_tokens=(\d+), .*?max_prefill_tokens=(\d+), max_running_requests=(\d+)")


@dataclass(frozen=True, slots=True)
class Interval:
    """What a server did between two lines of its log about decoding: LOGGED_STEPS steps and `batches` of prompts."""

    requests: float  # that ran, on average
    tokens: float  # in the cache, on average
    seconds: float
    batches: int = 0
    prompt_tokens: int = 0  # in them, not cached
    idle: bool = False  # the server had nothing to do in between: how long that was is not told


def read_intervals(lines: Sequence[str]) -> Iterator[Interval]:
    """Yields the intervals that the lines of a server's log tell of."""
    before: tuple[int, int] | None = None
    running: list[int] = []
    batches, tokens, idle = 0, 0, False
    for line in lines:
        if (prefill := PREFILL.search(line)) is not None:
            new, fresh, others = map(int, prefill.groups()[:3])
            running.append(new + others)
            batches, tokens, idle = batches + 1, tokens + fresh, idle or not others
        elif (decode := DECODE.search(line)) is not None:
            now, rate = (int(decode[1]), int(decode[2])), float(decode[3])
            if before is not None and rate > 0:
                requests = fmean([before[0], *running, now[0]])
                seconds = LOGGED_STEPS * requests / rate
                yield Interval(requests, (before[1] + now[1]) / 2, seconds, batches, tokens, idle)
            before, running, batches, tokens, idle = now, [], 0, 0, False


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Returns coefficients, none below 0, whose products with `rows` come nearest to `seconds`: least squares.

    Every choice of columns is tried; there are few.
    """
    a, b = np.asarray(rows, float), np.asarray(seconds, float)
    best, least = np.zeros(a.shape[1]), float(b @ b)
    for size in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), size):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(a[:, columns], b, rcond=None)
            error = float(((a[:, columns] @ found - b) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(a.shape[1]), error
                best[columns] = found
    return [float(each) for each in best]


def server_speed(logs: Sequence[Sequence[str]], *, name: str) -> ServerSpeed:
    """Returns the speed of the servers that wrote `logs`, the lines of each. `name`: for people. Raises ConfigError.

    The whole of the intervals takes as long by it as it took: what else the host did then is part of the speed.
    """
    intervals = [each for log in logs for each in read_intervals(log) if each.requests >= 1]
    intervals = [each for each in intervals if not each.idle] or intervals
    if len(intervals) < FEWEST:
        raise ConfigError(
            f"{name}: its servers' logs have {len(intervals)} pairs of lines about decoding; {FEWEST} are needed to know how "
            "fast they are. Give a run with longer answers, or more steps."
        )
    prompt = prompt_token_s([line for log in logs for line in log])
    work, took = np.asarray([_work(each) for each in intervals]), np.asarray([each.seconds for each in intervals])
    read = prompt * np.asarray([each.prompt_tokens for each in intervals])
    found = np.asarray(fit(work.tolist(), np.maximum(took - read, 0.0).tolist()))
    found *= float(took.sum()) / max(float((work @ found + read).sum()), 1e-9)
    request, token = float(found[1]) / MOST_REQUESTS, float(found[2]) / MOST_TOKENS
    cache = next((match for log in logs for line in log if (match := CACHE.search(line)) is not None), None)
    bounds = {} if cache is None else dict(zip(BOUNDS, map(int, cache.groups()), strict=True))
    step = max(float(found.sum()), LEAST_STEP_S)
    return ServerSpeed(step, request, token, prefill_s=step, prefill_token_s=prompt, **bounds)


def _work(interval: Interval) -> tuple[float, ...]:
    """What an interval is made of besides prompts' tokens: passes through the model; with as much again for every MOST_REQUESTS
    requests that are decoded; and for every MOST_TOKENS tokens in the cache.

    A batch of prompts is a pass as a decoding step is. The bounds keep a log that never had many requests from telling that each
    of them is dear.
    """
    passes = float(LOGGED_STEPS + interval.batches)
    each = LOGGED_STEPS * interval.requests / MOST_REQUESTS, LOGGED_STEPS * interval.tokens / MOST_TOKENS
    return passes, passes + each[0], passes + each[1]


def prompt_token_s(lines: Sequence[str]) -> float:
    """Returns the seconds of reading one token of a prompt: of large batches that followed another one, the quickest quarter.

    What such a line says is the time since the batch before it, which is more than its own where the server did something else.
    """
    rates = [float(found[4]) for line in lines if (found := PREFILL.search(line)) is not None and int(found[2]) >= LARGE]
    return 1 / float(np.quantile(rates, 0.75)) if rates else 0.0


def trainer_speed(
    steps: Sequence[dict[str, float]], lengths: dict[int, list[int]], attention: float, optimizer_steps: int = 1
) -> TrainerSpeed:
    """Returns the trainer's speed from the metrics of training `steps`, of `optimizer_steps` each, and their samples' `lengths`.

    Measured are the seconds per token, and where some steps had far more tokens than others (SPREAD), those of an optimizer step
    besides. `attention` is the model's, from its shape.
    """
    costs = []
    for step in steps:
        samples = lengths.get(int(step["step"]), [])
        costs.append(sum(n + attention * n * n for n in samples) or step["perf/train_tokens_per_s"] * step["time/train"])
    phases = ("rollout", "train", "publish", "evaluate", "checkpoint")
    between = [step["time/step"] - sum(step.get(f"time/{phase}", 0.0) for phase in phases) for step in steps]
    took, optimizer_s = [step["time/train"] for step in steps], 0.0
    if max(costs) > SPREAD * min(costs) and len(steps) >= FEWEST_STEPS:
        optimizer_s, _ = fit([(float(optimizer_steps), cost) for cost in costs], took)
    token_s = max(0.0, sum(took) - optimizer_s * optimizer_steps * len(steps)) / sum(costs)
    return TrainerSpeed(token_s, attention, optimizer_s=optimizer_s, step_s=max(0.0, median(between)))


def measured(run_dir: Path, *, dp: int, attention: float, first: int | None = None, warm_up: int = WARM_UP) -> Speeds:
    """Returns the speeds of the run in `run_dir`, which had `dp` data-parallel ranks.

    Looked at are the steps behind the `warm_up`, up to step `first`; None: to the last. Raises ConfigError where it does not tell
    enough.
    """
    told = [values for values in read_lines(run_dir / "metrics.jsonl") if "time/train" in values]
    steps = [step for step in told if warm_up < step["step"] <= (first or float("inf"))]
    since = max((step["time"] for step in told if step["step"] <= warm_up), default=0.0)
    logs = list(_logs(run_dir, since, steps[-1]["time"])) if steps else []
    if not logs or not steps:
        lacks = "no logs/server_*.log" if steps else f"no step after the first {warm_up} in metrics.jsonl"
        raise ConfigError(
            f"{run_dir} has {lacks}, which speeds are measured from; give the directory of a run, or leave run= out."
        )
    lengths = _lengths(run_dir, [int(step["step"]) for step in steps])
    trainer = trainer_speed(steps, lengths, attention, _of_training(run_dir, "optimizer_steps", 1))
    return Speeds(
        server=server_speed(logs, name=str(run_dir)),
        trainer=replace(trainer, token_s=trainer.token_s * dp),
        publish_s=_published(steps, "publish/total"),
        paused_s=_published(steps, "publish/paused"),
        source=f"measured in {run_dir}, steps {int(steps[0]['step'])} to {int(steps[-1]['step'])}",
    )


def _published(steps: Sequence[dict[str, Any]], name: str) -> float:
    """Returns the mean seconds of the steps that published; one at which a run is stopped does not. 0 where none did."""
    return fmean([step[name] for step in steps if name in step] or [0.0])


def overlaps(run_dir: Path) -> bool:
    """Returns whether rollouts and training of a run went on at the same time, as its resolved configuration says."""
    return _of_training(run_dir, "staleness", 0) > 0


def _of_training(run_dir: Path, key: str, otherwise: int) -> int:
    """Returns a number of the section `train` of the run's resolved configuration."""
    path = run_dir / "config.yaml"
    return int(yaml.safe_load(path.read_text(encoding="utf-8"))["train"][key]) if path.is_file() else otherwise


def _logs(run_dir: Path, since: float, until: float) -> Iterator[list[str]]:
    """Yields lines of each server's log: those before the first that tells a time, and from `since` to `until`, since 1970."""
    for path in sorted((run_dir / "logs").glob("server_*.log")):
        lines, kept = path.read_text(encoding="utf-8", errors="replace").splitlines(), True
        found = []
        for line in lines:
            if (stamp := STAMP.match(line)) is not None:
                kept = since <= time.mktime(time.strptime(stamp[1], "%Y-%m-%d %H:%M:%S")) <= until or bool(CACHE.search(line))
            if kept:
                found.append(line)
        yield found


def _lengths(run_dir: Path, steps: Sequence[int]) -> dict[int, list[int]]:
    """Tokens of each sample of these steps, prompts and answers of tools included, where trajectories were kept."""
    found = {}
    for step in steps:
        lines = read_lines(run_dir / "rollouts" / f"step_{step:08d}.jsonl")
        found[step] = [len(line["prompt_ids"]) + sum(len(t["token_ids"]) for t in line["turns"]) - 1 for line in lines]
    return found
