"""What Triton compiles for GPUs. Import a module of this folder only where `usable` says so.

No GPU was there when these were written: they have run in Triton's interpreter, which has neither a GPU's rounding of sums nor
its memory, and no speed is known. So no run uses them; `tests/unit/kernels/test_triton.py` holds them to torch, on a GPU as
compiled.
"""

from __future__ import annotations

import importlib.util


def usable() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
