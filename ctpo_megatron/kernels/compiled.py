"""Functions that numba compiles, kept from one start to the next: compiling those of a server takes a second and a half.

They lie beside Python's own compiled files, under a name that tells what they were made of: numba looks at one file, the
function's own, and would not see that another one has changed. numba tells versions of itself and processors apart.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba


def compiled(signature: Any, sources: Sequence[str], **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator as `numba.njit`, which keeps what it has compiled where that can be written.

    `signature`: None where the first call is to tell it. `sources`: the files whose text the function is made of, its own first.
    """
    place = None if sys.dont_write_bytecode else _place(sources)

    def decorate(function: Callable[..., Any]) -> Any:
        if place is None:
            return numba.njit(signature, **options)(function)
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(place)  # read when the function is decorated
        try:
            return numba.njit(signature, cache=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = before

    return decorate


def _place(sources: Sequence[str]) -> Path | None:
    """The directory for functions that are made of `sources`; None where it cannot be written."""
    text = hashlib.blake2b(digest_size=8)
    for source in sources:
        text.update(Path(source).read_bytes())
    place = Path(importlib.util.cache_from_source(sources[0])).with_name(f"numba-{text.hexdigest()}")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place if os.access(place, os.W_OK) else None
