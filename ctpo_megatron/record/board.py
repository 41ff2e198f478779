"""TensorBoard's event files of a run."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.errors import storing
from ctpo_megatron.record.catalogue import charts
from ctpo_megatron.record.files import GrowingFile, Through, at_once
from ctpo_megatron.record.hparams import MEASURES, Setting
from ctpo_megatron.record.tfevents import VERSION, cut_steps
from ctpo_megatron.record.windows import window_charts

HISTOGRAM_BINS = 30


class Board:
    """One run's events. What earlier files in `directory` hold of `first_step` or later is cut out of them; `cut` says what.

    `settings`: what the tab HParams compares the run by; None: it is none of those that are compared. `plain`: without charts.

    Events are written by the caller, `through` something, and can be read at once. tensorboardX's SummaryWriter has a thread that
    dies of a full disk, and whoever adds the eleventh event afterwards waits for ever; its EventsWriter keeps what failed in a
    buffer, and writes it twice when it is tried again. Here StorageError is raised, and nothing is left of what failed.
    """

    def __init__(
        self,
        directory: Path,
        first_step: int,
        through: Through = at_once,
        *,
        settings: Mapping[str, Setting] | None = None,
        plain: bool = False,
    ) -> None:
        from tensorboardX import summary  # it imports torch where that is installed; `ctpo doctor` has no time for it
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        with storing(directory / "events.out.tfevents.*"):
            directory.mkdir(parents=True, exist_ok=True)
            # the library names files by the second only, and readers take them in the order of their names
            self.cut = cut_steps(directory, first_step)
            numbers = [int(path.suffix[1:]) for path in directory.glob("events.*") if path.suffix[1:].isdigit()]
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{max(numbers, default=-1) + 1}"
        self._file = GrowingFile(directory / name, through, beside=True)
        self._file.open()
        self._write(Event(file_version=VERSION))
        # a TensorBoard that is open while the run resumes has read the old files, and drops their points where it sees this
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        if not plain:
            self._write(Event(summary=summary.custom_scalars(charts() | window_charts())))
        if settings is not None:
            experiment, session, _end = summary.hparams(dict(settings), dict.fromkeys(MEASURES, 0.0))
            self._write(Event(summary=experiment))
            self._write(Event(summary=session))

    def scalars(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        """Add a point per metric, all in one record. `at`: seconds since 1970, here and below; None: now."""
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._add(Summary(value=points), step, at)

    def histogram(self, name: str, values: Sequence[float], step: int, at: float | None = None) -> None:
        """Add a histogram of the finite `values`; nothing where there is none."""
        array = np.asarray(values, dtype=np.float64).ravel()
        array = array[np.isfinite(array)]
        if not array.size:
            return
        counts, edges = np.histogram(array, bins=HISTOGRAM_BINS)
        moments = (float(array.sum()), float(np.square(array).sum()))
        ends = (float(array.min()), float(array.max()))
        made = self._histogram(name, ends, array.size, moments, edges.tolist(), counts.tolist())
        self._add(made, step, at)

    def buckets(self, name: str, edges: Sequence[float], heights: Sequence[float], step: int, at: float | None = None) -> None:
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
        made = self._histogram(name, ends, float(counts.sum()), moments, limits.tolist(), counts.tolist())
        self._add(made, step, at)

    def text(self, name: str, text: str, step: int, at: float | None = None) -> None:
        """Add Markdown. What UTF-8 cannot hold is shown as a question mark."""
        self._add(self._summary.text(name, text.encode("utf-8", errors="replace").decode("utf-8")), step, at)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int, at: float | None = None) -> None:
        """Add a picture, `pixels` [height, width, 3]."""
        self._add(self._summary.image(name, pixels, dataformats="HWC"), step, at)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()

    def _add(self, summary: Any, step: int, at: float | None) -> None:
        self._write(self._event(summary=summary, step=step), at)

    def _write(self, event: Any, at: float | None = None) -> None:
        event.wall_time = time.time() if at is None else at
        self._file.append(_framed(event.SerializeToString()))

    def _histogram(
        self,
        name: str,
        ends: tuple[float, float],
        count: float,
        moments: tuple[float, float],
        limits: list[float],
        counts: list[float],
    ) -> Any:
        """Returns a histogram of its smallest and largest value, how many there are, their sum and their squares' sum."""
        # TensorBoard reads the first limit as the lower edge, so it gets an empty bucket
        return self._summary.histogram_raw(name, *ends, count, *moments, limits, [0.0, *counts])


def _framed(content: bytes) -> bytes:
    """Returns a record of an event file: the content's length, its checksum, the content, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))
