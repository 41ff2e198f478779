"""TensorBoard event files, written with TensorBoard's own writer; torch is not needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

HISTOGRAM_BINS = 30


class Board:
    """One run's events. Points that earlier files in `directory` hold at `purge_step` or later are dropped by readers."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        self._writer = EventFileWriter(str(directory))
        # TensorBoard drops what earlier files hold from this step on when it reads a START
        start = Event(step=purge_step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        self._writer.add_event(start)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self._add(step, [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()])

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """One histogram; nothing where no value is finite."""
        array = np.asarray(values, dtype=np.float64).ravel()
        array = array[np.isfinite(array)]
        if not array.size:
            return
        counts, edges = np.histogram(array, bins=HISTOGRAM_BINS)
        proto = HistogramProto(
            min=array.min(),
            max=array.max(),
            num=array.size,
            sum=array.sum(),
            sum_squares=np.square(array).sum(),
            # TensorBoard reads the first limit as the lower edge, so it gets an empty bucket
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],
        )
        self._add(step, [Summary.Value(tag=name, histo=proto)])

    def buckets(self, name: str, edges: Sequence[float], heights: Sequence[float], step: int) -> None:
        """A histogram of given `heights` [n], none negative, between `edges` [n+1]; nothing where none is positive."""
        tall = np.flatnonzero(np.asarray(heights) > 0)
        if not tall.size:
            return
        # TensorBoard drops empty buckets at both ends and lets what is left reach from min to max
        first, end = int(tall[0]), int(tall[-1]) + 1
        limits, counts = np.asarray(edges[first : end + 1], dtype=np.float64), np.asarray(heights[first:end], dtype=np.float64)
        centers = (limits[1:] + limits[:-1]) / 2
        proto = HistogramProto(
            min=limits[0],
            max=limits[-1],
            num=counts.sum(),
            sum=(counts * centers).sum(),
            sum_squares=(counts * centers**2).sum(),
            bucket_limit=limits.tolist(),
            bucket=[0.0, *counts.tolist()],
        )
        self._add(step, [Summary.Value(tag=name, histo=proto)])

    def text(self, name: str, text: str, step: int) -> None:
        """Markdown."""
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode("utf-8", errors="replace")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(step, [Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def flush(self) -> None:
        """Make everything visible to readers."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
