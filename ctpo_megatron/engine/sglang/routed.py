"""Lets an unpatched SGLang report the experts that tokens go to on hosts without a GPU (`--enable-return-routed-experts`).

SGLang 0.5.23 keeps that record in host memory which it registers with CUDA, so that devices can write to it; on a CPU the call
fails for want of CUDA. There it has nothing to do, and a hook of SGLang's plugin framework makes it do nothing.
tests/integration/test_sglang_parts.py tells when this is no longer needed.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

TARGET = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device."""
    if not torch.cuda.is_available():
        HookRegistry.register(TARGET, leave_as_it_is, HookType.REPLACE)


def leave_as_it_is(buffer: torch.Tensor, *_options: Any) -> None:
    """Do nothing: no device will ever read or write this memory."""
