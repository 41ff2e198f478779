"""The CPU platform that lets an unpatched SGLang serve on hosts without a GPU.

SGLang finds `activate` through the entry-point group `sglang.srt.platforms`; on its own it serves on a CPU only with AMX.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

DISPATCH_KEY = "native"


def activate() -> str | None:
    """Dotted name of the platform class where torch sees no CUDA device, None where SGLang's own platform serves."""
    return None if torch.cuda.is_available() else f"{__name__}.{CpuPlatform.__name__}"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain PyTorch operators only: no Triton, no graph capture, no AMX kernels."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        """The name of the attention backend: PyTorch's own."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """The key under which SGLang's layers find their plain PyTorch methods, `forward_native`."""
        return DISPATCH_KEY

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """False: there is no device to pin memory for."""
        return False
