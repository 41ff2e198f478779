"""The distributed optimizer's state for a checkpoint, and four faults of Megatron-Core 0.16.1 on the way there and back.

The state is stored in the shape of the parameters (`fully_reshardable`), so that any layout can read it.
tests/dist/test_checkpoint.py says when one of the bridges is no longer needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def optimizer_shards(
    optimizer: MegatronOptimizer, model_shards: dict[str, Any], metadata: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """Returns megatron's description of this rank's part. The data-parallel ranks gather it, so all have to call it."""
    begin_state(optimizer)
    with padding_counted(optimizer):
        return optimizer.sharded_state_dict(model_shards, is_loading=loading, metadata={**metadata, **SHARDING})


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take what was read for the description of `optimizer_shards`."""
    with steps_kept(optimizer):
        optimizer.load_state_dict(loaded)
    separate_steps(optimizer)


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the state it would make in its first step; megatron cannot describe an optimizer before that."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam) and not part.optimizer.state:
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


@contextlib.contextmanager
def padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside it the gradient buffers say that they have no padding between their buckets.

    megatron gathers the state without that padding, but looks each parameter up where it lies with it. From the second
    bucket on (tied embeddings make one) parameters would be stored with their neighbours' numbers.
    """
    buffers = [buffer for part in optimizer.chained_optimizers for buffer in part.buffers]
    buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
    unpadded = [(owner, owner.numel_unpadded) for owner in (*buffers, *buckets)]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
    for bucket in buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for owner, size in unpadded:
            owner.numel_unpadded = size


@contextlib.contextmanager
def steps_kept(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside it an optimizer that loads leaves Adam's `step` alone.

    megatron restores it with the parameter groups, and then looks for it again among the parameters' tensors, where it is not
    stored. Only torch's Adam, used where there is no GPU, has that entry.
    """
    for part in optimizer.chained_optimizers:
        _keep_step(part)
    try:
        yield
    finally:
        for part in optimizer.chained_optimizers:
            del part._set_main_param_and_optimizer_states  # the class's own again


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own `step`.

    megatron restores torch's Adam with one tensor for all, which every parameter then counts up once per update.
    """
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _keep_step(part: Any) -> None:
    set_state = part._set_main_param_and_optimizer_states

    def with_step(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        present = part._get_main_param_and_optimizer_states(parameter)
        set_state(parameter, {**{key: value for key, value in present.items() if key == "step"}, **tensors})

    part._set_main_param_and_optimizer_states = with_step
