"""A server's part in the first broadcast of an update group (`engine.update_group`): it says that it has joined only afterwards.

NCCL builds a communicator in the first collective. SGLang's would be a bucket of weights, while generation is paused; and a
server that cannot be reached would show only then. A hook of SGLang's plugin framework moves it into the request that joins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ctpo_megatron.engine.update_group import first_broadcast

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

TARGET = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.init_weights_update_group"

Joined = tuple[bool, str]
"""Whether a rank has joined the group, and a message about it."""


def register() -> None:
    """Call it before SGLang applies what is registered, in every process of a server."""
    HookRegistry.register(TARGET, connect, HookType.AFTER)


def connect(
    joined: Joined,
    updater: WeightUpdater,
    _address: str,
    _port: int,
    _rank_offset: int,
    _world_size: int,
    group_name: str,
    _backend: str = "nccl",
) -> Joined:
    """What `init_weights_update_group` gives, once this rank has received the group's first broadcast too."""
    if not joined[0]:
        return joined
    try:
        first_broadcast(updater._model_update_group[group_name], torch.device(updater.device))
    except RuntimeError as error:
        return False, f"Failed to receive the first broadcast of the group: {error}"
    return joined
