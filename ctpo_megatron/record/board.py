"""TensorBoard's event files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ctpo_megatron.record.catalogue import charts

HISTOGRAM_BINS = 30
FLUSH_S = 1  # the library writes in a thread of its own; what is added is on the disk after so many seconds


class Board:
    """One run's events. Points that earlier files in `directory` hold at `purge_step` or later are dropped by readers."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        from tensorboardX import SummaryWriter  # it imports torch where that is installed; `ctpo doctor` has no time for it

        # the library names files by the second only, and readers take them in the order of their names
        suffix = f".{len(list(directory.glob('events.*')))}"
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=FLUSH_S, filename_suffix=suffix)
        self._writer.add_custom_scalars(charts())

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Add a histogram of the finite `values`; nothing where there is none."""
        array = np.asarray(values, dtype=np.float64).ravel()
        array = array[np.isfinite(array)]
        if not array.size:
            return
        counts, edges = np.histogram(array, bins=HISTOGRAM_BINS)
        moments = (float(array.sum()), float(np.square(array).sum()))
        self._add(name, (float(array.min()), float(array.max())), array.size, moments, edges.tolist(), counts.tolist(), step)

    def buckets(self, name: str, edges: Sequence[float], heights: Sequence[float], step: int) -> None:
        """Add a histogram of given `heights` [n], none negative, between `edges` [n+1]; nothing where none is positive."""
        tall = np.flatnonzero(np.asarray(heights) > 0)
        if not tall.size:
            return
        # TensorBoard drops empty buckets at both ends and lets what is left reach from min to max
        first, end = int(tall[0]), int(tall[-1]) + 1
        limits, counts = np.asarray(edges[first : end + 1], dtype=np.float64), np.asarray(heights[first:end], dtype=np.float64)
        centers = (limits[1:] + limits[:-1]) / 2
        moments = (float((counts * centers).sum()), float((counts * centers**2).sum()))
        ends = (float(limits[0]), float(limits[-1]))
        self._add(name, ends, float(counts.sum()), moments, limits.tolist(), counts.tolist(), step)

    def text(self, name: str, text: str, step: int) -> None:
        """Add Markdown. What UTF-8 cannot hold is shown as a question mark."""
        self._writer.add_text(name, text.encode("utf-8", errors="replace").decode("utf-8"), step)

    def close(self) -> None:
        """Flush and close. Safe to call twice."""
        self._writer.close()

    def _add(
        self,
        name: str,
        ends: tuple[float, float],
        count: float,
        moments: tuple[float, float],
        limits: list[float],
        counts: list[float],
        step: int,
    ) -> None:
        """Add a histogram from its smallest and largest value, how many there are, their sum and their squares' sum."""
        # TensorBoard reads the first limit as the lower edge, so it gets an empty bucket
        self._writer.add_histogram_raw(name, *ends, count, *moments, limits, [0.0, *counts], step)
