"""Files of records that only grow: each record carries its length and a checksum, so what a dead process left half written shows.

    file     = MAGIC record*
    record   = length (4 bytes, little-endian), CRC-32 of the payload (4 bytes), payload

A process never adds to the file of another one: it begins the next segment, NNNNNNNN.journal.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.errors import StorageError, storing
from ctpo_megatron.record.files import GrowingFile, Through, at_once

MAGIC = b"ctpo journal 1\n"
SUFFIX = ".journal"
_HEAD = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the payload of a record is."""

    path: Path
    offset: int  # bytes from the file's beginning
    size: int

    def read(self) -> bytes:
        """Returns the payload. Raises StorageError where the file does not hold it any more."""
        with storing(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            payload = file.read(self.size)
        if len(payload) != self.size:
            raise StorageError(f"{self.path}: it was cut short while the run used it; a record at byte {self.offset} is gone")
        return payload


class SegmentWriter:
    """The segment that this process adds to; the file is made by the first record.

    `through`: how records are written. Where a record is, or will be, is known without the disk.
    """

    def __init__(self, directory: Path, through: Through = at_once) -> None:
        self._directory, self._through = directory, through
        self._last = max((int(path.stem) for path in segments(directory)), default=0)
        self.path: Path | None = None
        self._file: GrowingFile | None = None
        self._size = 0
        self._added: list[bytes] = []  # and not written yet
        self._ended: list[GrowingFile] = []  # segments of which something may not be on the disk

    def add(self, payload: bytes) -> Place:
        """Take up a record, to be written with those before it by `write`; returns where it will be."""
        if self._file is None or self.path is None:
            self._begin()
        assert self.path is not None
        self._added += (_HEAD.pack(len(payload), zlib.crc32(payload)), payload)
        place = Place(self.path, self._size + _HEAD.size, len(payload))
        self._size += _HEAD.size + len(payload)
        return place

    def write(self) -> None:
        """Write all that was added, at one go; other processes see it at once.

        Raises StorageError, and leaves the file as it was; the next call tries again, in the same order.
        """
        if self._added:
            assert self._file is not None
            self._file.append(b"".join(self._added))
            self._added = []

    def append(self, payload: bytes) -> Place:
        """`add` and `write`."""
        place = self.add(payload)
        self.write()
        return place

    def _begin(self) -> None:
        self._last += 1
        self.path = self._directory / f"{self._last:08d}{SUFFIX}"
        self._file = GrowingFile(self.path, self._through, beside=True)
        self._added, self._size = [MAGIC], len(MAGIC)

    def unsynced(self) -> list[GrowingFile]:
        """Returns the segments, the oldest first, that have to be synced so that all that was written outlives the host."""
        return self._ended if self._file is None else [*self._ended, self._file]

    def synced(self, files: list[GrowingFile]) -> None:
        """Note that `files` were."""
        self._ended = [file for file in self._ended if file not in files]

    def end(self) -> None:
        """Write what was added, and let the next record begin another segment. Safe to call twice. Raises StorageError."""
        self.write()
        if self._file is not None:
            self._file.close()
            self._ended.append(self._file)
        self._file, self.path = None, None


def segments(directory: Path) -> list[Path]:
    """Returns the segments in `directory`, the oldest first; other files there are left out."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdigit())


def read_segment(path: Path) -> Iterator[tuple[Place, bytes]]:
    """Yield all whole records of a segment, up to the first that is not as it was written."""
    with storing(path):
        data = path.read_bytes()
    if not data.startswith(MAGIC):
        return
    offset = len(MAGIC)
    while offset + _HEAD.size <= len(data):
        size, checksum = _HEAD.unpack_from(data, offset)
        offset += _HEAD.size
        payload = data[offset : offset + size]
        if len(payload) != size or zlib.crc32(payload) != checksum:
            return
        yield Place(path, offset, size), payload
        offset += size


def cut(path: Path, end: int) -> int:
    """Drop what stands after byte `end` of a segment; returns how many bytes that were. Raises StorageError."""
    with storing(path):
        size = path.stat().st_size
        if size > end:
            os.truncate(path, end)
    return max(size - end, 0)
