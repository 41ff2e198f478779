"""Real runs of `ctpo train` with a real fault in them: what they are, how they are made, and when there is harm.

A healthy run of the quickstart's model makes BASE steps. Each fault goes on from a copy of its directory with `--resume auto` and
other settings, as somebody would who changes one thing too many, or with a hand from outside; so alarms know what was before.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from ctpo_megatron.errors import InputError
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.events import ServerLost, ServerSuspended
from ctpo_megatron.record.story import Happened
from ctpo_megatron.record.story_events import IncarnationBegan, IncarnationEnded

ROOT = Path(__file__).resolve().parent.parent
BASE, FURTHER = 48, 26  # steps of the healthy run, and of a fault
GROUPS, ANSWERS = 8, 64  # of a step
MEASURE = Measure(GROUPS, ANSWERS, "reward/term/answer")
LIMIT_S = 900.0
HEARD = (ServerLost.name, ServerSuspended.name, IncarnationBegan.name, IncarnationEnded.name)
KEPT = (  # beginnings of names
    *("step", "eval/accuracy", "reward/mean", "reward/term/answer", "reward/mixed", "reward/undecided", "train/entropy"),
    *("rollout/response_tokens", "rollout/truncated", "rollout/unanswered", "rollout/staleness_mean", "tool/error_rate"),
    *("ledger/aborted", "health/clip_fraction/decile", "health/effective", "drift/mean", "drift/from_token", "moe/load_max"),
    *("train/correction_log", "host/memory_used", "time/rollout", "time/batch", "time/train", "time/step"),
)
ANSWER = "{name: answer, reward: {type: math}}"
HEALTHY = (
    f"train.steps={BASE}",
    f"train.prompts_per_step={GROUPS}",
    "train.optimizer_steps=2",
    "train.staleness=1",
    "optimizer.lr=4e-5",
    "optimizer.schedule=constant",
    "rollout.engine.servers=2",
    f"rollout.reward={{type: combination, terms: [{ANSWER}, {{name: more, weight: 0.1, reward: {{type: length, max_tokens: 96, "
    "buffer: 16}}]}",
    "eval.every=2",
    f"checkpoint.every={BASE}",
    "checkpoint.export=false",
    "log.save_tokens=false",
    "log.tensorboard=false",
    "drift.max=null",
    "cluster.watch.floor_s=600",  # the machine has other work
)
Harm = Callable[[list[Row]], int | None]


def reward(function: str, weight: float) -> str:
    """Returns the setting of a reward that adds a function of tools/faulty_rewards.py to the answer's."""
    more = f"{{name: more, weight: {weight}, reward: {{type: function, function: 'faulty_rewards:{function}', processes: 2}}}}"
    return f"rollout.reward={{type: combination, terms: [{ANSWER}, {more}]}}"


def five_points(rows: list[Row]) -> int | None:
    """Returns the step at which accuracy, the median of three evaluations, is 5 points below its best."""
    found = [(int(row["step"]), row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    smooth = [(step, statistics.median(each for _, each in found[max(0, n - 2) : n + 1])) for n, (step, _) in enumerate(found)]
    bests = [max(each for _, each in smooth[: n + 1]) for n in range(len(smooth))]
    return next((step for (step, now), best in zip(smooth, bests, strict=True) if step > BASE and now < best - 0.05), None)


def beyond(name: str, limit: float, *, above: bool = True) -> Harm:
    """Returns the first step of the fault at which a metric is above, or below, a limit."""

    def harm(rows: list[Row]) -> int | None:
        there = [(int(row["step"]), row[name]) for row in rows if name in row and row["step"] > BASE]
        return next((step for step, value in there if (value > limit if above else value < limit)), None)

    return harm


def lost_time(steps: int, kinds: tuple[str, ...] = ("time/step",)) -> Harm:
    """Returns when the fault has cost as much time as so many of the steps before it took."""

    def harm(rows: list[Row]) -> int | None:
        before = [row for row in rows if "time/step" in row and row["step"] <= BASE][10:]
        after = [row for row in rows if "time/step" in row and row["step"] > BASE]
        usual = statistics.median(later["time"] - earlier["time"] for earlier, later in pairwise(before))
        lost = 0.0
        for earlier, later in pairwise(after):
            lost += later["time"] - earlier["time"] - usual
            if lost > steps * usual:
                return int(later["step"])
        return None

    return harm


@dataclass(frozen=True)
class Fault:
    """A fault: the alarms that are to tell of it, the settings that make it, and its harm. `hand`: a server is slowed."""

    name: str
    story: str
    alarms: tuple[str, ...]
    settings: tuple[str, ...]
    harm_words: str
    harm: Harm
    hand: bool = False


NO_END = "rollout.undecided_share=1"
FIVE = "accuracy is 5 points below its best"
FAULTS = [
    Fault("none", "none: the run goes on as it was", (), (), FIVE, five_points),
    Fault("rate", "`optimizer.lr` 50 times as high", ("entropy",), ("optimizer.lr=2e-3",), FIVE, five_points),
    Fault(
        "paid",
        "a reward that pays three times as much for length as for answers",
        ("length", "format", "accuracy"),
        (reward("pays_for_length", 3.0), "optimizer.lr=2e-4"),
        FIVE,
        five_points,
    ),
    Fault(
        "grader",
        "a grader that raises for 0.6 % more of the answers at each step",
        ("undecided",),
        (reward("loses_its_way", 0.0), NO_END),
        "a tenth of a step's answers, where `rollout.undecided_share` ends a run",
        beyond("reward/undecided", 0.1 * ANSWERS),
    ),
    Fault(
        "answers",
        "a file of prompts with the answers of others, so that nothing is right",
        ("equal_groups",),
        ("data.train={work}/wrong.jsonl", "data.allow_change=true"),
        "as many steps without a gradient as 20 have",
        lambda rows: next((int(row["step"]) for row in rows if row["step"] > BASE + 20), None),
    ),
    Fault(
        "old",
        "`train.staleness` 6 in place of 1",
        ("stale",),
        ("train.staleness=6",),
        FIVE,
        five_points,
    ),
    Fault(
        "weights",
        "rollouts 6 versions old, a learning rate 10 times as high, and sequence weights to make up for both",
        ("mismatch",),
        (
            "train.staleness=6",
            "optimizer.lr=4e-4",
            "algorithm.anchor=old",
            "algorithm.correction={type: truncate, level: sequence}",
        ),
        "a tenth of the batch is left, exp(2 m)",
        beyond("train/correction_log", -1.15, above=False),
    ),
    Fault(
        "bounds",
        "bounds of the objective a hundredth of what they were",
        ("clip",),
        ("algorithm.objective={type: ctpo, clip_low: 2.5e-4, clip_high: 5e-4, dual_clip: 5e-4}",),
        "9 of 10 tokens of some tenth are clipped",
        lambda rows: min(filter(None, (beyond(f"health/clip_fraction/decile_{k}", 0.9)(rows) for k in range(10))), default=None),
    ),
    Fault(
        "slow",
        "one of the two servers is stopped for four fifths of the time",
        ("servers",),
        (),
        "20 steps' time is lost",
        lost_time(20),
        hand=True,
    ),
    Fault(
        "leak",
        "a reward function that keeps 1.5 MB with every answer",
        ("memory",),
        (reward("leaks", 0.0),),
        "98 % of the memory is in use",
        beyond("host/memory_used", 0.98),
    ),
    Fault(
        "evaluates",
        "an evaluation of 128 prompts, 4 times each, after every step",
        ("goodput",),
        ("eval.every=1", "eval.samples=4", "eval.temperature=1"),
        "20 steps' time is lost",
        lost_time(20),
    ),
    Fault(
        "cache",
        "servers that keep their cache in bfloat16, which the canary is told to let pass",
        ("drift",),
        ("rollout.engine.extra_args=[--kv-cache-dtype, bfloat16]", "drift.mean=null", "attest.canary_tolerance=1"),
        "0.001 nats, where `drift.mean` ends a run in float32",
        beyond("drift/mean", 1e-3),
    ),
]


def make_base(quickstart: Path, work: Path, seed: int) -> None:
    """Make the healthy run in WORK/base, from what `make quickstart` left, and the file of wrong answers."""
    work.mkdir(parents=True, exist_ok=True)
    _write_wrong_answers(quickstart / "data" / "train.parquet", work / "wrong.jsonl")
    files = {"model.path": "sft/model", "data.train": "data/train.parquet", "data.eval": "data/eval.parquet"}
    paths = (f"seed={seed}", *(f"{key}={quickstart / file}" for key, file in files.items()))
    (work / "base.words").write_text(json.dumps(paths))
    _train(work / "base", (*paths, *HEALTHY), None)


def make_fault(fault: Fault, work: Path) -> None:
    """Make the run of a fault in WORK/NAME."""
    run_dir = work / fault.name
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(work / "base", run_dir)
    paths = json.loads((work / "base.words").read_text())
    further = (*(each.replace("{work}", str(work)) for each in fault.settings), f"train.steps={BASE + FURTHER}")
    _train(run_dir, (*paths, *HEALTHY, *further, "--resume", "auto"), _slowed if fault.hand else None)


def _train(run_dir: Path, words: tuple[str, ...], hand: Callable[[psutil.Process], Any] | None) -> None:
    command = [sys.executable, "-m", "ctpo_megatron.cli", "train", str(ROOT / "configs" / "quickstart.yaml"), *words]
    command.append(f"run_dir={run_dir}")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with run_dir.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path})
        try:
            with contextlib.nullcontext() if hand is None else hand(psutil.Process(process.pid)):
                code = process.wait(LIMIT_S)
        except BaseException:
            process.terminate()
            process.wait(60)
            raise
    if code:
        raise InputError(f"{run_dir}: the run ended with code {code}; {run_dir.with_suffix('.log')} says why")


@contextlib.contextmanager
def _slowed(driver: psutil.Process) -> Iterator[None]:
    """A context in which the first scheduler below `driver` is stopped for four fifths of the time, half a second at a time."""
    over = threading.Event()

    def slow() -> None:
        victim: psutil.Process | None = None
        while not over.wait(0.1):
            with contextlib.suppress(psutil.Error):
                if victim is None or not victim.is_running():
                    victim = _scheduler(driver)
                    continue
                victim.send_signal(signal.SIGSTOP)
                over.wait(0.4)
                victim.send_signal(signal.SIGCONT)
        with contextlib.suppress(psutil.Error):
            if victim is not None:
                victim.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _scheduler(driver: psutil.Process) -> psutil.Process | None:
    """Returns a scheduler once both servers are up: one that is stopped while it starts is another fault."""
    found = [each for each in driver.children(recursive=True) if each.cmdline()[:1] and "sglang::scheduler" in each.cmdline()[0]]
    return min(found, key=lambda each: each.pid) if len(found) == 2 and _ready(driver) else None


def _ready(driver: psutil.Process) -> bool:
    words = driver.cmdline()
    run_dir = Path(next(word for word in reversed(words) if word.startswith("run_dir=")).removeprefix("run_dir="))
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return events[::-1].index("ready") < events[::-1].index(IncarnationBegan.name) if "ready" in events else False


def _write_wrong_answers(source: Path, target: Path) -> None:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(source).to_pylist()
    answers = [row["reward_model"]["ground_truth"] for row in rows]
    for row, answer in zip(rows, answers[1:] + answers[:1], strict=True):
        row["reward_model"]["ground_truth"] = answer
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def keep(run_dir: Path, file: Path, first_step: int) -> None:
    """Keep what alarms look at, from `first_step` on, in four digits: rows, and the events between them."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = []
    for row in (each for each in lines if each["step"] >= first_step):
        values = {name: float(f"{float(value):.4g}") for name, value in row.items() if name.startswith(KEPT)}
        kept.append({**values, "step": row["step"], "time": round(row["time"], 2)})
    began = kept[0]["time"]
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] in HEARD and (first_step == 1 or event["time"] > began - 120):
            fields = {name: event[name] for name in ("server", "at", "process", "number") if name in event}
            kept.append({"time": round(event["time"], 2), "event": event["event"], **fields})
    kept.sort(key=lambda each: each["time"])
    data = "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in kept).encode()
    file.write_bytes(gzip.compress(data, mtime=0))


def read(*files: Path) -> list[dict[str, Any]]:
    """Returns the rows and events that `keep` kept in several files, one after the other."""
    return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def judge(lines: list[dict[str, Any]], alarms: Alarms) -> list[AlarmRaised]:
    """Returns the alarms that rows and events raise, in their order."""
    raised: list[AlarmRaised] = []
    for line in lines:
        if "event" in line:
            alarms.event(Happened(line["time"], line["event"], line))
        else:
            raised += [each for each in alarms.row(line) if isinstance(each, AlarmRaised)]
    return raised
