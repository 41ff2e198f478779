"""Imports of thousands of modules, as quick as they can be."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def modules_stay() -> Iterator[None]:
    """Context for imports without Python's search for garbage, which would walk through all modules again and again.

    Nor does it look at them later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
