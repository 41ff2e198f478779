"""Where a run's numbers go: metrics.jsonl, TensorBoard and a line on the console."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record.board import Board
from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.record.files import MetricsFile, Through, at_once
from ctpo_megatron.record.story_events import BoardCut
from ctpo_megatron.record.tfevents import Cut

CONSOLE_KEYS = (
    "reward/mean",
    "eval/accuracy",
    "train/loss",
    "sft/loss_smoothed",
    "train/grad_norm",
    "rollout/response_tokens",
    "drift/mean",
    "time/step",
)
TABLE_WIDTH = 120  # of tables where the console is a file


class Recorder:
    """Writes under `run_dir`. `first_step` is how many training steps are already done: 0, or where a run is resumed.

    What an earlier attempt in the same directory wrote after that is dropped, in TensorBoard too, so that a run which was
    stopped and resumed shows one curve. `stale`: the first step that is written anew. `through`: how records are written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        first_step: int = 0,
        console: Console | None = None,
        emit: Emit = discard,
        through: Through = at_once,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.stale = stale = first_step + 1 if first_step else 0  # a fresh run writes step 0, the policy before training
        self._console = console or Console(highlight=False)
        self._every = config.every
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", stale, through)
        self._board = Board(run_dir / "tb", stale, through) if config.tensorboard else None
        if self._board is not None and self._board.cut != Cut():
            emit(BoardCut(stale, *astuple(self._board.cut)))

    def step(self, step: int, metrics: Mapping[str, float], *, board: bool = True) -> dict[str, Any]:
        """Record the metrics of `step`, names like `reward/mean`; metrics.jsonl has them afterwards, and TensorBoard's file too.
        Returns the line of metrics.jsonl.

        `board`: False for metrics that come behind those of a later step: TensorBoard would drop the later ones.
        Raises ValueError, before anything is written, for a name that is not in the catalogue.
        """
        require_known(metrics)
        written = self._metrics.write(step, metrics)
        if self._board is not None and board:
            self._board.scalars(step, metrics)
        if step % self._every == 0:
            self.show(console_line(step, metrics))
        return written

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

    def close(self) -> None:
        """Close everything; safe to call twice."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()


def console_line(step: int, metrics: Mapping[str, float]) -> str:
    """Returns the metrics a person watches, in a fixed order; all of them where none of these is there.

    Of an evaluation on some benchmarks these are their accuracies.
    """
    shown = [key for key in CONSOLE_KEYS if key in metrics]
    shown = shown or [key for key in metrics if key.startswith("eval/accuracy/")] or list(metrics)
    return "  ".join([f"step {step}", *(f"{key} {metrics[key]:.4g}" for key in shown)])
