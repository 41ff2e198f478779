"""A file of lines that grows, read as it grows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CHUNK = 4 << 20  # bytes that are read at a time


class Tail:
    """The whole lines of the file at `path`, each of them given once.

    Call `look`, then `fresh`. A run that resumes replaces metrics.jsonl by a shorter one: all lines of the new file come then.
    `missing`: the file was not there at the last look.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing = False
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = self._size = 0
        self._half = b""

    def look(self) -> bool:
        """Returns whether the file is another one than that whose lines were given. Raises OSError where it is out of reach."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self.missing = True
            return False
        self.missing, self._size = False, found.st_size
        place, known = (found.st_dev, found.st_ino), self._file
        if place == known and found.st_size >= self._offset:
            return False
        self._file, self._offset, self._half = place, 0, b""
        return known is not None

    def fresh(self) -> Iterator[bytes]:
        """Yields the lines that have come since the last call, without their ends; a half line waits for its other half.

        Raises OSError where the file cannot be read.
        """
        if self.missing or self._size == self._offset:
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while chunk := file.read(CHUNK):
                self._offset += len(chunk)
                *whole, self._half = (self._half + chunk).split(b"\n")
                yield from whole
