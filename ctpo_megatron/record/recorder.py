"""Where a run's numbers go: metrics.jsonl, TensorBoard, the sinks that are asked for, and a line on the console.

metrics.jsonl is the record. The others are written aside: a step waits for none of them, and what one of them loses is told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, RenderableType

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.errors import StorageError
from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.events import Emit, Event, discard
from ctpo_megatron.record.files import MetricsFile, Through, at_once, steps_from
from ctpo_megatron.record.hparams import Setting
from ctpo_megatron.record.run_board import RunBoard
from ctpo_megatron.record.sink_events import PointsLost
from ctpo_megatron.record.story_events import BoardCut
from ctpo_megatron.record.tfevents import Cut
from ctpo_megatron.record.windows import window_begin

CONSOLE_KEYS = (
    "reward/mean",
    "eval/accuracy",
    "train/loss",
    "sft/loss_smoothed",
    "sft/eval_loss",
    "train/grad_norm",
    "rollout/response_tokens",
    "drift/mean",
    "time/step",
)
TABLE_WIDTH = 120  # of tables where the console is a file
TELL_S = 60.0  # between two events about what one of them lost
SAMPLES = "progress/samples"


class Outlet(Protocol):
    """A place besides metrics.jsonl that takes a run's numbers; none of its methods but `close` waits for anything."""

    name: str

    def step(self, step: int, metrics: Mapping[str, float], samples: float | None, at: float) -> None:
        """Take the metrics of a step, up to which `samples` trajectories were trained on; `at`: seconds since 1970."""
        ...

    def lost(self) -> tuple[int, str]:
        """Returns how many pieces it lost since it was asked last, and why."""
        ...

    def close(self) -> None:
        """Take nothing more; returns in bounded time. Safe to call twice."""
        ...


class Sink(Outlet, Protocol):
    """A sink that the configuration asks for."""

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """Take a phase of a step, which `began` at so many seconds since 1970."""
        ...

    def event(self, event: Event, at: float) -> None:
        """Take what happened at so many seconds since 1970."""
        ...


class Recorder:
    """Writes under `run_dir`. `first_step` is how many training steps are already done: 0, or where a run is resumed.

    What an earlier attempt in the same directory wrote after that is dropped, in TensorBoard too, so that a run which was
    stopped and resumed shows one curve. `stale`: the first step that is written anew. `samples`: how many were trained on in the
    steps that are done; None: not known. `settings`: what TensorBoard compares runs by. `sinks`: they outlive the recorder.
    `through`: how records are written; `aside`: the same for TensorBoard, by a thread of its own.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        first_step: int = 0,
        samples: int | None = None,
        settings: Mapping[str, Setting] | None = None,
        sinks: Sequence[Sink] = (),
        console: Console | None = None,
        emit: Emit = discard,
        through: Through = at_once,
        aside: Through = at_once,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.stale = stale = first_step + 1 if first_step else 0  # a fresh run writes step 0, the policy before training
        self._console = console or Console(highlight=False)
        self._every = config.every
        self._samples: float | None = samples
        self._emit = emit
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", stale, through)
        self._board: RunBoard | None = None
        if config.tensorboard:
            before = steps_from(run_dir / "metrics.jsonl", window_begin(stale)) if stale else []
            self._board = RunBoard(run_dir, stale, samples=samples, before=before, settings=settings, through=aside)
            if self._board.cut != Cut():
                emit(BoardCut(stale, *astuple(self._board.cut)))
        self._sinks = tuple(sinks)
        self._outlets: tuple[Outlet, ...] = (*(() if self._board is None else (self._board,)), *sinks)
        self._lost: dict[str, tuple[int, str]] = {}  # by each of them, and not told yet
        self._tell_at = 0.0

    def step(self, step: int, metrics: Mapping[str, float], *, board: bool = True) -> dict[str, Any]:
        """Record the metrics of `step`, names like `reward/mean`; metrics.jsonl has them afterwards. Returns its line.

        `board`: False for metrics that come behind those of a later step: TensorBoard would drop the later ones, and a sink take
        them for the newest. Raises ValueError, before anything is written, for a name that is not in the catalogue.
        """
        require_known(metrics)
        written = self._metrics.write(step, metrics)
        if board:
            self._samples = metrics.get(SAMPLES, self._samples)
            at = time.time()
            for each in self._outlets:
                each.step(step, metrics, self._samples, at)
        self._tell_lost()
        if step % self._every == 0:
            self.show(console_line(step, metrics))
        return written

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """Record a phase of a step, which `began` at so many seconds since 1970, in the sinks that take phases."""
        for sink in self._sinks:
            sink.phase(name, step, began, seconds)

    def show(self, what: RenderableType) -> None:
        """Print a line or a table on the console."""
        with contextlib.suppress(OSError):  # it may be a file on the disk that is full
            width = None if isinstance(what, str) or self._console.is_terminal else TABLE_WIDTH
            self._console.print(what, soft_wrap=True, markup=False, width=width)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Show the distribution of `values` in TensorBoard; values that are not finite are left out."""
        if self._board is not None:
            self._board.histogram(name, values, step)

    def buckets(self, name: str, edges: Sequence[float], heights: Sequence[float], step: int) -> None:
        """Show a histogram in TensorBoard whose `heights` [n] between `edges` [n+1] are given."""
        if self._board is not None:
            self._board.buckets(name, edges, heights, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show Markdown in TensorBoard's text panel."""
        if self._board is not None:
            self._board.text(name, text, step)

    def loads(self, name: str, load: NDArray[np.float64], step: int) -> None:
        """Show a picture in TensorBoard of how loaded experts are, `load` [layers, experts]."""
        if self._board is not None:
            self._board.loads(name, load, step)

    def close(self) -> None:
        """Close everything but the sinks, in bounded time; safe to call twice."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()
        with contextlib.suppress(StorageError):  # whoever closes has nothing to do with what an event's line meets
            self._tell_lost(now=True)

    def _tell_lost(self, *, now: bool = False) -> None:
        """Emit what the places aside have lost, at most once in TELL_S."""
        for each in self._outlets:
            pieces, reason = each.lost()
            if pieces:
                self._lost[each.name] = (self._lost.get(each.name, (0, ""))[0] + pieces, reason)
        if self._lost and (now or time.monotonic() >= self._tell_at):
            self._tell_at = time.monotonic() + TELL_S
            told, self._lost = self._lost, {}
            for name, (pieces, reason) in told.items():
                self._emit(PointsLost(name, pieces, reason))


def console_line(step: int, metrics: Mapping[str, float]) -> str:
    """Returns the metrics a person watches, in a fixed order; all of them where none of these is there.

    Of an evaluation on some benchmarks these are their accuracies.
    """
    shown = [key for key in CONSOLE_KEYS if key in metrics]
    shown = shown or [key for key in metrics if key.startswith("eval/accuracy/")] or list(metrics)
    return "  ".join([f"step {step}", *(f"{key} {metrics[key]:.4g}" for key in shown)])
