"""The CPU platform that lets an unpatched SGLang serve on hosts without a GPU.

SGLang calls `activate` through the entry-point group `sglang.srt.platforms`; on its own it serves on a CPU only with AMX.
"""

from __future__ import annotations


def activate() -> str | None:
    """Dotted name of the platform class where torch sees no CUDA device, None where SGLang's own platform serves."""
    import torch  # SGLang has imported it already when it asks

    return None if torch.cuda.is_available() else "ctpo_megatron.cluster.sglang_cpu.CpuPlatform"
