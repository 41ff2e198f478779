"""What a keeper holds: of each rank the part of the copy that stays, and that of the one that is being handed over. No Ray."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctpo_megatron.errors import CopyLost

MOST = 2  # parts of a rank at a time
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class _Part:
    row: Bytes
    arrived: dict[int, int] = field(default_factory=dict)  # pieces of the row: where each begins, and where it ends
    contents: bytes | None = None  # None: not all of it is here

    def is_whole(self) -> bool:
        """Whether the pieces cover the row."""
        end = 0
        for begin, piece_end in sorted(self.arrived.items()):
            if begin != end:
                return False
            end = piece_end
        return end == len(self.row)


class Shelf:
    """Parts of copies by training step and rank, at most two of each rank. Any thread may call it."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], _Part] = {}
        self._lock = threading.Lock()

    def begin(self, step: int, rank: int, size: int, stays: int | None) -> None:
        """Make room for `size` bytes of `rank`. All that it has here goes, but for its part of the copy after step `stays`."""
        with self._lock:
            self._parts = {at: part for at, part in self._parts.items() if at[1] != rank or at[0] == stays != step}
            self._parts[step, rank] = _Part(np.empty(size, dtype=np.uint8))

    def put(self, step: int, rank: int, begin: int, piece: Bytes) -> None:
        """Take the piece of a part that begins at `begin`. Raises CopyLost where no room was made for it."""
        part = self._part(step, rank)
        end = begin + len(piece)
        if part.contents is not None or begin < 0 or end > len(part.row):
            raise CopyLost(f"bytes {begin} to {end} do not belong into the part of rank {rank} after step {step}")
        part.row[begin:end] = piece
        part.arrived[begin] = end

    def finish(self, step: int, rank: int, contents: bytes) -> None:
        """Take what describes a part, after the last piece. Raises CopyLost where pieces are missing."""
        part = self._part(step, rank)
        if not part.is_whole():
            raise CopyLost(f"pieces of the part of rank {rank} after step {step} have not come")
        part.contents = contents

    def retain(self, step: int) -> None:
        """Let everything go but the copy after `step`."""
        with self._lock:
            self._parts = {at: part for at, part in self._parts.items() if at[0] == step}

    def contents(self, step: int, rank: int) -> bytes:
        """Returns what describes a part. Raises CopyLost where not all of it is here."""
        found = self._part(step, rank).contents
        if found is None:
            raise CopyLost(f"the part of rank {rank} after step {step} is incomplete")
        return found

    def read(self, step: int, rank: int, begin: int, end: int) -> Bytes:
        """Returns these bytes of a part's row. Raises CopyLost where not all of it is here."""
        self.contents(step, rank)
        return self._part(step, rank).row[begin:end]

    def held(self) -> dict[tuple[int, int], int]:
        """Returns the bytes of each part, by step and rank, those that are incomplete included."""
        with self._lock:
            return {at: len(part.row) for at, part in self._parts.items()}

    def _part(self, step: int, rank: int) -> _Part:
        with self._lock:
            if (step, rank) not in self._parts:
                raise CopyLost(f"there is no part of rank {rank} after step {step}")
            return self._parts[step, rank]
