"""Numbers on their way to disk: JSON that survives NaN, crashes and resuming."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import StorageError, storing


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
    """A file that grows by whole records. One that does not fit on the disk any more leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storing(path):
            self._file = path.open("ab", buffering=0)  # no buffer: what failed once is not tried again when it is closed

    def append(self, record: bytes) -> None:
        """Add a record: others who read the file see it at once. Raises StorageError where the disk does not take it."""
        left, size = memoryview(record), os.fstat(self._file.fileno()).st_size
        try:
            with storing(self._path):
                while left:
                    left = left[self._file.write(left) :]
        except StorageError:
            with contextlib.suppress(OSError):  # not a plain file
                os.ftruncate(self._file.fileno(), size)
            raise

    def append_line(self, line: str) -> None:
        """Add a line of text, as `append` does."""
        self.append(line.encode("utf-8") + b"\n")

    def sync(self) -> None:
        """Bring what was added onto the disk; it then outlives the host. Raises StorageError."""
        with storing(self._path):
            os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()


class MetricsFile:
    """metrics.jsonl: one object a line, `step` and `time` (seconds since 1970) first; complete after every line.

    Lines of one step belong together: training and evaluation write their own.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        drop_steps(path, first_step)
        self._file = GrowingFile(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of `step`. Raises StorageError where the disk does not take them."""
        record = {"step": step, "time": round(time.time(), 3), **jsonable(metrics)}
        self._file.append_line(json.dumps(record, allow_nan=False))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
