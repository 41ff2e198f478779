"""Tokens of some trajectories as a part that a page loads when somebody looks at one of them.

A part is the base64 text of a zlib stream of

    length of the header (4 bytes, little-endian), header (JSON), streams

The header has an entry for each trajectory: facts, segments, runs of equal versions, and where its streams begin. Streams come in
planes of bytes, since planes compress better than numbers: n token ids as three planes from the lowest byte on; of the m tokens
that the policy wrote logp, and where training was recorded gap and log_ratio, as float16 in two planes each, the higher first,
and fate in one. Of a float16 the last four bits are rounded away: what is shown is within 0.8 % of what was recorded.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.record.token_files import TokenRecord
from ctpo_megatron.report.viewer.rows import Row
from ctpo_megatron.report.viewer.streams import Streams

PART_TOKENS = 1 << 17
LEVEL = 1  # of zlib: higher ones take four times as long for a tenth of the size
_LARGEST = float(np.finfo(np.float16).max)


class Facts(msgspec.Struct, gc=False):
    """What a part says of a trajectory besides its streams. `text` where the pieces of tokens are not known."""

    id: str
    answer: str
    given: str | None
    terms: dict[str, Any]
    why: str
    seconds: Any
    text: str | None
    segments: list[tuple[int, int, int]]
    versions: list[tuple[int, int]]  # (version, how many tokens of the policy's it wrote)
    begin: int
    tokens: int
    sampled: int
    recorded: bool


class PartMaker:
    """Collects trajectories until a part is full. `texts`: whether parts hold decoded responses."""

    def __init__(self, texts: bool) -> None:
        self._texts = texts
        self._clear()

    def _clear(self) -> None:
        self._facts: list[Facts] = []
        self._planes: list[bytes] = []
        self._size = self.tokens = 0

    def add(self, row: Row, streams: Streams, record: TokenRecord | None) -> int:
        """Take a trajectory in; returns its place in the part."""
        planes = _planes(streams, record)
        self._facts.append(
            Facts(
                id=row.id,
                answer=row.answer,
                given=row.given,
                terms=row.terms,
                why=row.why,
                seconds=row.seconds,
                text=row.text if self._texts else None,
                segments=[(each.author, each.tokens, each.branch) for each in streams.segments],
                versions=_runs(streams.versions),
                begin=self._size,
                tokens=len(streams.ids),
                sampled=len(streams.logp),
                recorded=record is not None,
            )
        )
        self._planes += planes
        self._size += sum(map(len, planes))
        self.tokens += len(streams.ids)
        return len(self._facts) - 1

    def take(self) -> str:
        """Returns what was collected as a part, and begins the next one."""
        header = msgspec.json.encode(self._facts)
        packed = packed_text(struct.pack("<I", len(header)) + header + b"".join(self._planes))
        self._clear()
        return packed


def packed_text(content: bytes) -> str:
    """Returns bytes as a text that a page can hold."""
    return base64.b64encode(zlib.compress(content, LEVEL)).decode("ascii")


def _planes(streams: Streams, record: TokenRecord | None) -> list[bytes]:
    ids = streams.ids
    planes = [((ids >> shift) & 0xFF).astype(np.uint8).tobytes() for shift in (0, 8, 16)]
    planes += _halves(streams.logp)
    if record is not None:
        planes += [*_halves(record.gap), *_halves(record.log_ratio), record.fate.astype(np.uint8).tobytes()]
    return planes


def _halves(values: NDArray[Any]) -> list[bytes]:
    """Returns the higher and the lower bytes of float16 with six bits behind the point."""
    bits = np.clip(np.asarray(values, np.float32), -_LARGEST, _LARGEST).astype(np.float16).view(np.uint16)
    finite = (bits & 0x7C00) != 0x7C00
    rounded = np.where(finite, np.minimum((bits & 0x7FFF) + 8, 0x7BFF) & 0x7FF0 | bits & 0x8000, bits).astype(np.uint16)
    return [(rounded >> 8).astype(np.uint8).tobytes(), (rounded & 0xFF).astype(np.uint8).tobytes()]


def _runs(values: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Returns runs of equal values: (value, how many)."""
    if not values.size:
        return []
    begins = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    counts = np.diff([*begins.tolist(), values.size])
    return list(zip(values[begins].tolist(), counts.tolist(), strict=True))
