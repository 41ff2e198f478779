"""The plugin of SGLang's: `/weights_checker` answers with digests that the trainer can predict (`engine.digest`).

SGLang's own hashes, SHA-256 on CPUs, cannot be put together from the parts that the trainer has, and take longer than the update.
Of weights in fp8 blocks it hashes what they stand for, rounded to bfloat16; here the bytes of blocks and scales are digested.
SGLang finds `activate` in every process of a server through the entry-point group `sglang.srt.plugins`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctpo_megatron.engine.checksums import write_digest
from ctpo_megatron.engine.digest import tensor_digest

TARGET = "sglang.srt.utils.weight_checker._hash_tensor"
QUANTISED = "sglang.srt.utils.weight_checker._build_quantized_set"


def activate() -> None:
    """Put this package's digest in the place of SGLang's hash, and register the hooks of update groups and of the store."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ctpo_megatron.engine.sglang import store, update_group

    HookRegistry.register(TARGET, hash_tensor, HookType.REPLACE)
    HookRegistry.register(QUANTISED, nothing_stands_for_another, HookType.REPLACE)
    update_group.register()
    store.register()


def hash_tensor(tensor: Tensor) -> str:
    """The digest of a parameter as text, in the place of `sglang.srt.utils.weight_checker._hash_tensor`."""
    return write_digest(tensor_digest(tensor))


def nothing_stands_for_another(_model: Any) -> dict[str, Any]:
    """No weights, in the place of those that SGLang would hash together with their scales."""
    return {}
