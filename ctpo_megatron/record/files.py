"""Numbers on their way to disk: JSON that survives NaN, crashes and resuming."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import storing

LAST_LINES = 1000  # of a metrics.jsonl, which has one for a step and one more for each evaluation and checkpoint

Through = Callable[[Callable[[], None]], None]
"""Does a write: at once, or, while the storage is at fault, later and in order (`storage.Storage.write`)."""


def at_once(write: Callable[[], None]) -> None:
    """Do the write now; what it raises comes out."""
    write()


def jsonable(value: Any) -> Any:
    """`value` for strict JSON: non-finite numbers become the strings "NaN", "Infinity" and "-Infinity".

    `float()` of these strings gives the number back. Numbers of numpy become Python's, paths and the like their text.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):
        return jsonable(value.item())
    if not isinstance(value, float):
        return str(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def write_summary(run_dir: Path, summary: Mapping[str, Any], name: str = "summary.json") -> None:
    """Replace the file `name` in `run_dir` by `summary` as JSON."""
    write_text(run_dir / name, json.dumps(jsonable(summary), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step: a reader sees the old text or the new one, never a half. Raises StorageError."""
    part = path.with_name(f".{path.name}.part")
    with storing(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def drop_steps(path: Path, first_step: int) -> None:
    """Remove from a JSON-lines file what a stopped attempt wrote at `first_step` or later, and a half-written last line."""
    _keep_lines(path, lambda line: json.loads(line)["step"] < first_step)


def last_steps(path: Path, count: int) -> list[dict[str, float]]:
    """Returns the metrics of the last `count` training steps in a metrics.jsonl, the oldest first; none where it is not there."""
    if not path.exists():
        return []
    with storing(path), path.open(encoding="utf-8") as file:
        lines = deque((line for line in file if '"train/loss"' in line), maxlen=count)
    return [{name: float(value) for name, value in json.loads(line).items()} for line in lines]


def steps_from(path: Path, first_step: int) -> list[tuple[int, dict[str, float]]]:
    """Returns step and metrics of the last lines of a metrics.jsonl that are of `first_step` or later; none where there is none.

    Only as many lines are looked at as a few hundred steps may have.
    """
    if not path.exists():
        return []
    with storing(path), path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in deque(file, maxlen=LAST_LINES)]
    kept = [row for row in rows if row["step"] >= first_step]
    return [(row["step"], {name: float(value) for name, value in row.items() if name not in ("step", "time")}) for row in kept]


def drop_half_line(path: Path) -> None:
    """Remove from a file of lines a last one that an attempt was stopped in the middle of."""
    _keep_lines(path, lambda _line: True)


def _keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Rewrite the file, if it is there, with its whole lines that are `wanted`."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and wanted(line)]
    if kept != lines:
        write_text(path, "".join(kept))


class GrowingFile:
    """A file that grows by whole records. One that does not fit on the disk any more leaves nothing behind.

    `through`: how records are written. `beside`: its directory is for files like it, and is made where it is missing; the run's
    own is not, as it may be away. A record that was half written is taken back before anything else is added, also where the file
    has to be opened again for that: its file system may have been away, or its handle be stale.
    """

    def __init__(self, path: Path, through: Through = at_once, *, beside: bool = False) -> None:
        self._path, self._through, self._beside = path, through, beside
        self._file: FileIO | None = None
        self._torn_at: int | None = None  # where the half of a record begins that could not be taken back

    def open(self) -> None:
        """Open the file now, and not with the first record. Raises StorageError."""
        with storing(self._path):
            self._opened()

    def append(self, record: bytes) -> None:
        """Add a record: others who read the file see it at once. Raises StorageError where the disk does not take it."""
        self._through(partial(self._append, record))

    def append_line(self, line: str) -> None:
        """Add a line of text, as `append` does."""
        self.append(line.encode("utf-8") + b"\n")

    def sync(self) -> None:
        """Bring what was added onto the disk; it then outlives the host. Raises StorageError."""
        # FileNotFoundError: somebody has deleted the file, and nothing of it is left to be brought anywhere
        with storing(self._path), contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self._path, os.O_RDONLY)  # its own: it is called in a thread, beside `append`
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Close the file behind what was added. Safe to call twice; a record that comes later opens it again."""
        self._through(self._close)

    def _append(self, record: bytes) -> None:
        with storing(self._path):
            file = self._opened()
            size = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(record)
                while left:
                    left = left[file.write(left) :]
            except OSError:
                self._torn_at = size
                with contextlib.suppress(OSError):  # not a plain file, or one that is out of reach now
                    self._take_back(file)
                raise

    def _opened(self) -> FileIO:
        if self._file is not None and not self._is_there(self._file):
            self._close()
        if self._file is None:
            if self._beside:
                self._path.parent.mkdir(exist_ok=True)
            # no buffer: what failed once is not tried again when it is closed
            self._file = self._path.open("ab", buffering=0)
        self._take_back(self._file)
        return self._file

    def _is_there(self, file: FileIO) -> bool:
        """Whether the open file is the one that its path names."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except OSError:  # moved away, or a stale handle
            return False

    def _take_back(self, file: FileIO) -> None:
        if self._torn_at is not None and os.fstat(file.fileno()).st_size > self._torn_at:
            os.ftruncate(file.fileno(), self._torn_at)
        self._torn_at = None

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of a stale handle; each record was written without a buffer
                file.close()


class MetricsFile:
    """metrics.jsonl: one object a line, `step` and `time` (seconds since 1970) first; complete after every line.

    Lines of one step belong together: training and evaluation write their own.
    """

    def __init__(self, path: Path, first_step: int, through: Through = at_once) -> None:
        drop_steps(path, first_step)
        self._file = GrowingFile(path, through)
        self._file.open()

    def write(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Append the metrics of `step`; returns the line's object. Raises StorageError where the disk does not take them."""
        record = {"step": step, "time": round(time.time(), 3), **jsonable(metrics)}
        self._file.append_line(json.dumps(record, allow_nan=False))
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()
