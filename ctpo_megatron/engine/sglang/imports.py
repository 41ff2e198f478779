"""How the process of a server imports SGLang: in half of the time on a CPU, and a fifth faster on a GPU.

SGLang 0.5.23 imports 8,000 modules. tests/integration/test_sglang_environment.py tells when what is hidden here need not be.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

# Kernels for NVIDIA's GPUs that SGLang imports wherever they are installed, and cutlass with them: a fifth of the time.
ABSENT_ON_CPU = ("flashinfer",)

# Of no use to a server. SGLang's debugging dumps ask Megatron, where it is installed, for the place of a trainer in the same
# process; that brings torch's compiler and 1,000 modules with it.
ABSENT_IN_SERVERS = ("megatron",)

# The same on CPUs: kernels for experts on GPUs, and how `--tool-server`, which needs a tokenizer, calls tools of other servers.
ABSENT_IN_SERVERS_ON_CPU = ("triton_kernels", "mcp")

# Optional parts of libraries that SGLang imports; whoever imports one when a server is up gets it.
ABSENT_AT_FIRST = ("mistral_common", "scipy", "trio")

# What a server imports when it has started, on CPUs in each of its processes: brought forward, it is imported once. One of them
# decorates functions with `torch.compile`, which would bring torch's compiler.
LATER = (
    "sglang.srt.dllm.algorithm.base",
    "sglang.srt.distributed.device_communicators.custom_all_reduce",
    "sglang.srt.entrypoints.openai.serving_responses",
    "sglang.srt.managers.tp_worker",
    "sglang.srt.model_executor.model_runner",
)


def hide_kernels() -> None:
    """Let kernels for GPUs seem not installed where torch sees no CUDA device. Call it before SGLang is imported."""
    if not torch.cuda.is_available():
        _hide(ABSENT_ON_CPU)


def _hide(names: tuple[str, ...]) -> list[str]:
    """Let packages that nobody has imported yet seem not installed. Returns which."""
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(hidden))  # None makes `import name` raise ImportError
    return hidden


@contextlib.contextmanager
def lean_server() -> Iterator[None]:
    """Context in which the process of a server imports SGLang, without what no server uses."""
    _hide(ABSENT_IN_SERVERS)
    if torch.cuda.is_available():
        yield
        return
    hide_kernels()
    _hide(ABSENT_IN_SERVERS_ON_CPU)
    for_now = _hide(ABSENT_AT_FIRST)
    try:
        with nothing_compiled():
            yield
    finally:
        for name in for_now:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def bring_forward() -> None:
    """Import LATER, where torch sees no CUDA device: there, schedulers are forked."""
    if not torch.cuda.is_available():
        for name in LATER:
            importlib.import_module(name)


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
