"""What TensorBoard and all sinks together cost a training step, side by side in one run.

    python tools/bench_record.py                                     TensorBoard, Prometheus and OpenTelemetry
    python tools/bench_record.py --python .venv-sinks/bin/python     besides Weights & Biases (offline) and MLflow (files)

Steps with the record and steps without take turns; both do the same arithmetic, which takes about `--step-s`. Of a recorded step
it is told for how long the step itself stood in calls of the record, what these calls and the record's threads used of CPUs, and
what the processes of the sinks used. CPU times hold beside other work; wall times, and their ratio, want a machine that is free.
Ends with exit code 1 where all CPU time together is more than 1 % of a step.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.config.sinks import AnySink, MlflowSink, OtelSink, PrometheusSink, WandbSink
from ctpo_megatron.loop.health import health_histograms
from ctpo_megatron.ports import free_port
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.catalogue import CATALOGUE
from ctpo_megatron.record.recorder import SAMPLES
from ctpo_megatron.record.sink_process import RunWords, SinkProcess, check_sinks

SHARE = 0.01  # of a step
PHASES = ("rollout", "batch", "sleep", "train", "publish", "storage")
LAYERS, EXPERTS = 48, 128  # of Qwen3-30B-A3B
TEXT = "word " * 8000  # a trajectory of 8,000 tokens
WARM = 3  # recorded steps before it is measured: files and processes are opened in them


def names() -> list[str]:
    """All metrics that a step of a mixture of experts with eight servers may have."""
    numbers = {"{position}": [2**k for k in range(17)], "{k}": range(10), "{n}": range(8)}
    found: list[str] = []
    for metric in CATALOGUE:
        if metric.group in ("eval", "sft"):
            continue
        for placeholder, values in numbers.items():
            if placeholder in metric.name:
                found += [metric.name.replace(placeholder, str(value)) for value in values]
        if not metric.is_family:
            found.append(metric.name)
    return found


class Bench:
    """Recorded steps and plain ones."""

    def __init__(self, run_dir: Path, sinks: list[AnySink], step_s: float) -> None:
        (run_dir / "logs").mkdir()
        check_sinks(sinks)
        about = RunWords("bench", run_dir, {"optimizer.lr": 1e-3}, False)
        self._sinks = [SinkProcess(sink, about) for sink in sinks]
        self._recorder = Recorder(run_dir, LogConfig(every=10**9), sinks=self._sinks, console=Console(file=io.StringIO()))
        self._names, self._random = names(), np.random.default_rng(1)
        self._matrix = self._random.normal(size=(512, 512))
        self._products, self._step = 1, 0
        begun = time.perf_counter()
        while time.perf_counter() - begun < 0.5:
            self._matrix @ self._matrix
            self._products += 1
        self._products = max(1, round(self._products * step_s / 0.5))

    def plain(self) -> dict[str, float]:
        """The step's arithmetic."""
        wall = time.perf_counter()
        for _ in range(self._products):
            self._matrix @ self._matrix
        return {"wall": time.perf_counter() - wall}

    def recorded(self) -> dict[str, float]:
        """The same, and all that is recorded of a step, until nothing of it waits any more."""
        self._step += 1
        of_threads, of_sinks = cpu_of_threads(), self.cpu_of_sinks()
        wall = called = time.perf_counter()
        cpu = time.thread_time()
        metrics = dict(zip(self._names, self._random.normal(size=len(self._names)).tolist(), strict=True))
        self._recorder.step(self._step, metrics | {SAMPLES: 256.0 * self._step})
        for phase in PHASES:
            self._recorder.phase(phase, self._step, time.time(), 1.0)
        self._recorder.histogram("reward", list(metrics.values()), self._step)
        for name, (edges, heights) in health_histograms(metrics).items():
            self._recorder.buckets(name, edges, [abs(height) for height in heights], self._step)
        self._recorder.loads("moe/load", self._random.random((LAYERS, EXPERTS)), self._step)
        for index in range(2):
            self._recorder.text(f"rollout/{index}", TEXT, self._step)
        called, cpu = time.perf_counter() - called, time.thread_time() - cpu
        for _ in range(self._products):
            self._matrix @ self._matrix
        found = {"wall": time.perf_counter() - wall, "called": called}
        driver = cpu + cpu_of_threads() - of_threads
        return found | {"driver": driver, "sinks": self.cpu_of_sinks() - of_sinks}

    def cpu_of_sinks(self) -> float:
        """CPU seconds of all processes of sinks so far, with those that they have started."""
        total = 0.0
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def close(self) -> None:
        """End everything, and say what was lost."""
        self._recorder.close()
        for sink in self._sinks:
            sink.close()
            if (lost := sink.lost())[0]:
                print(f"{sink.name} lost {lost}")


def cpu_of_threads() -> float:
    """CPU seconds of the record's threads so far, as the scheduler counts them."""
    ids = [each.native_id for each in threading.enumerate() if each.name.startswith(("tensorboard", "sink "))]
    return sum(int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0]) for number in ids) / 1e9


def measure(bench: Bench, pairs: int) -> dict[str, float]:
    """Medians over `pairs` of a plain and a recorded step, in the order plain, recorded, recorded, plain."""
    for _ in range(WARM):
        bench.recorded()
    time.sleep(5.0)  # for what the sinks import
    found: list[dict[str, float]] = []
    for number in range(pairs):
        if number % 2:
            recorded, plain = bench.recorded(), bench.plain()
        else:
            plain, recorded = bench.plain(), bench.recorded()
        found.append(
            {
                "a step without, s": plain["wall"],
                "the step stands in calls, ms": 1e3 * recorded["called"],
                "CPU of the driver's record, ms": 1e3 * recorded["driver"],
                "CPU of the sinks' processes, ms": 1e3 * recorded["sinks"],
                "share of the step in calls": recorded["called"] / plain["wall"],
                "share of all CPU time": (recorded["driver"] + recorded["sinks"]) / plain["wall"],
                "wall time with, over without": recorded["wall"] / plain["wall"],
            }
        )
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main(
    step_s: Annotated[float, typer.Option(help="CPU seconds of a step's own arithmetic", min=0.1)] = 6.0,
    pairs: Annotated[int, typer.Option(help="of steps with and without", min=2)] = 20,
    python: Annotated[Path | None, typer.Option(help="interpreter that has wandb and mlflow")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Measure the record."""
    sinks: list[Any] = [PrometheusSink(port=free_port("127.0.0.1")), OtelSink()]
    if python is not None:
        sinks += [WandbSink(mode="offline", python=str(python)), MlflowSink(python=str(python))]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), sinks, step_s)
        try:
            found = measure(bench, pairs)
        finally:
            bench.close()
    table = Table(f"{len(names())} metrics, TensorBoard, {', '.join(sink.type for sink in sinks)}", "median")
    for name, value in found.items():
        table.add_row(name, f"{value:.2%}" if name.startswith("share") else f"{value:.3f}")
    Console(width=110).print(table)
    if file is not None:
        file.write_text(json.dumps(found, indent=2))
    raise typer.Exit(1 if found["share of all CPU time"] > SHARE else 0)


if __name__ == "__main__":
    typer.run(main)
