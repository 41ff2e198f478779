"""`tokens.judge` as numba keeps it on the disk, compiled.

numba (0.65) looks a function up by its own file and what it encloses, so a change in a file of the functions that it calls would
go unseen and old code would run. Hence only this one is kept, and it encloses a checksum of all their sources.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numba

from ctpo_megatron.kernels import numbers
from ctpo_megatron.kernels.cpu import judges, tokens

_tokens_judge = tokens.judge


def sources() -> int:
    """A checksum of everything that is compiled, at least 1."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(numbers.__file__)]
    return 1 + zlib.crc32(b"\0".join(file.read_bytes() for file in files))


def kept(checksum: int) -> Any:
    """`tokens.judge`, found on the disk where it was compiled from sources with this checksum."""

    @numba.njit(cache=True, **judges.compiled)
    def judge(how, consts, bounds, first, last, streams, mask, restarts, lookup, out, lengths, signs, sums, counts):
        if checksum:
            _tokens_judge(how, consts, bounds, first, last, streams, mask, restarts, lookup, out, lengths, signs, sums, counts)

    return judge


judge = kept(sources())
