"""SGLang on a CPU without AMX: the platform class named by `sglang_platform.activate`."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain PyTorch operators only: no Triton, no graph capture, no AMX kernels."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        """See `SRTPlatform`."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """See `SRTPlatform`: the `forward_native` methods."""
        return "native"

    def is_pin_memory_available(self, device=None) -> bool:
        """Never: there is no device to pin memory for."""
        return False
