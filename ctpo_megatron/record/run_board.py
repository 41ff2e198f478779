"""TensorBoard of a run: its points by steps and by samples, windows of what matters, written by a thread that no step waits for.

RUN_DIR/tb             every metric, over training steps; `windows/...`: extremes of what is watched over 100 steps
RUN_DIR/tb/by_samples  `samples/...`: what is watched, over the trajectories that were trained on, as a run of its own
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.errors import StorageError
from ctpo_megatron.record.aside import Aside
from ctpo_megatron.record.board import Board
from ctpo_megatron.record.catalogue import find
from ctpo_megatron.record.files import Through, at_once
from ctpo_megatron.record.heat import load_picture
from ctpo_megatron.record.hparams import Setting
from ctpo_megatron.record.windows import Windows

MOST = 2000  # pieces that wait for the disk: a step has five to ten
CLOSE_S = 10.0  # for what waits, when the run ends
DIRECTORY, BY_SAMPLES = "tb", "by_samples"
PICTURES_EVERY = 10  # steps, behind the first ten


class RunBoard:
    """The boards of the run in `run_dir`, which goes on with step `stale`. No call but `close` waits for the disk.

    `samples`: how many were trained on before; None: not known, and nothing is shown by them. `before`: what was recorded of the
    window that is open. `settings`: see `Board`. `through`: how the thread writes. Pieces that are lost are told by `lost`.
    """

    name = "TensorBoard"

    def __init__(
        self,
        run_dir: Path,
        stale: int,
        *,
        samples: int | None = None,
        before: Iterable[tuple[int, Mapping[str, float]]] = (),
        settings: Mapping[str, Setting] | None = None,
        through: Through = at_once,
        most: int = MOST,
    ) -> None:
        directory = run_dir / DIRECTORY
        self._board = Board(directory, stale, through, settings=settings)
        self.cut = self._board.cut
        self._by_samples: Board | None = None
        if samples is not None:
            self._by_samples = Board(directory / BY_SAMPLES, samples + 1 if stale else 0, through, plain=True)
            self.cut += self._by_samples.cut
        self._windows = Windows(before)
        self._aside = Aside("tensorboard", most)

    def step(self, step: int, metrics: Mapping[str, float], samples: float | None, at: float) -> None:
        """Show the metrics of `step`, up to which `samples` trajectories were trained on; `at`: seconds since 1970."""
        self._aside.put(partial(self._board.scalars, step, {**metrics, **self._windows.add(step, metrics)}, at))
        watched = {f"samples/{name}": value for name, value in metrics.items() if is_watched(name)}
        if self._by_samples is not None and samples is not None and watched:
            self._aside.put(partial(self._by_samples.scalars, int(samples), watched, at))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Show the distribution of `values`."""
        self._put(self._board.histogram, name, values, step)

    def buckets(self, name: str, edges: Sequence[float], heights: Sequence[float], step: int) -> None:
        """Show a histogram whose `heights` [n] between `edges` [n+1] are given."""
        self._put(self._board.buckets, name, edges, heights, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show Markdown."""
        self._put(self._board.text, name, text, step)

    def loads(self, name: str, load: NDArray[np.float64], step: int) -> None:
        """Show how loaded each expert of each layer is, `load` [layers, experts], as a picture: of the first ten steps and of
        every tenth behind them."""
        if step <= PICTURES_EVERY or step % PICTURES_EVERY == 0:
            at = time.time()
            self._aside.put(lambda: self._board.image(name, load_picture(load), step, at))

    def lost(self) -> tuple[int, str]:
        """Returns how many pieces were lost since it was asked last, and why."""
        return self._aside.lost()

    def close(self) -> None:
        """Write what waits, within CLOSE_S, and close the files. Safe to call twice."""
        self._aside.close(CLOSE_S)
        if self._aside.idle:  # else its thread hangs in a write, and holds the file
            for board in filter(None, (self._board, self._by_samples)):
                with contextlib.suppress(StorageError):  # nothing of it is in a buffer
                    board.close()

    def _put(self, show: Callable[..., None], *given: Any) -> None:
        self._aside.put(partial(show, *given, time.time()))


def is_watched(name: str) -> bool:
    """Whether a metric is one of those that matter most, as the catalogue says."""
    metric = find(name)
    return metric is not None and metric.watched
