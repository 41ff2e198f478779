"""How the process of a server imports SGLang: in half of the time on a CPU, and a fifth faster on a GPU.

SGLang 0.5.23 imports 7,500 modules. tests/integration/test_sglang_environment.py tells when what is hidden here need not be.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

# Kernels for NVIDIA's GPUs that SGLang imports wherever they are installed, and cutlass with them: a fifth of the time.
ABSENT_ON_CPU = ("flashinfer",)


def hide_kernels() -> None:
    """Let kernels for GPUs seem not installed where torch sees no CUDA device. Call it before SGLang is imported."""
    if not torch.cuda.is_available():
        modules: dict[str, Any] = sys.modules
        for name in ABSENT_ON_CPU:
            modules.setdefault(name, None)  # makes `import name` raise ImportError


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Context in which `torch.compile` leaves functions as they are, where torch sees no CUDA device.

    SGLang decorates a dozen functions while it is imported, and each asks for torch's compiler: a second, and 550 modules. On a
    CPU that compiler would call another one for each of them, in the middle of a run.
    """
    if torch.cuda.is_available():
        yield
        return
    before = torch.compile
    torch.compile = _as_it_is
    try:
        yield
    finally:
        torch.compile = before


def _as_it_is(model: Any = None, **_: Any) -> Any:
    return model if model is not None else lambda function: function


@contextlib.contextmanager
def environment_stays() -> Iterator[None]:
    """Context for imports of SGLang in a process whose children inherit its variables: SGLang sets those of caches."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
