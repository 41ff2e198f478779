"""The distributed optimizer's state for a checkpoint, and six faults of Megatron-Core 0.16.1 on the way there and back.

The state is stored in the shape of the parameters (`fully_reshardable`), so that any layout can read it.
tests/dist/test_checkpoint.py says when one of the bridges is no longer needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from ctpo_megatron.mcore.checkpoint.gathering import gathered_in_pieces

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def optimizer_shards(
    optimizer: MegatronOptimizer, model_shards: dict[str, Any], metadata: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """Returns megatron's description of this rank's part. The data-parallel ranks gather it, so all have to call it.

    The optimizer has its state: megatron cannot describe torch's Adam before that. Of the settings of parameter groups only plain
    values are stored, as nothing else may be unpickled; an optimizer that is offloaded keeps classes among them.
    """
    with padding_counted(optimizer), gathered_in_pieces(optimizer):
        described = optimizer.sharded_state_dict(model_shards, is_loading=loading, metadata={**metadata, **SHARDING})
    for _, settings in _parts(optimizer, described):
        settings["param_groups"] = [{k: v for k, v in group.items() if _plain(v)} for group in settings["param_groups"]]
    return described


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take what was read for the description of `optimizer_shards`.

    Of a stored parameter group only `step` is taken, the number of updates that were made. All else in it are settings: rates
    between which the schedule moves, betas, eps, weight decay. megatron would go on with the stored ones; the present ones are
    the configuration's. Raises KeyError for a group that the checkpoint lacks.
    """
    for part, settings in _parts(optimizer, loaded):
        stored = {_kind(group): group for group in settings["param_groups"]}
        settings["param_groups"] = [_gone_on(group, stored[_kind(group)]) for group in part.optimizer.param_groups]
    with steps_kept(optimizer):
        optimizer.load_state_dict(loaded)
    separate_steps(optimizer)


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what tells the parameter groups of one optimizer apart, on both sides of a checkpoint."""
    return tuple(group[key] for key in param_group_identifier_keys)


def _gone_on(present: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a present parameter group with the number of updates of the stored one."""
    settings = {key: value for key, value in present.items() if key not in ("params", "step")}
    return settings | {key: stored[key] for key in ("step",) if key in stored}


def _parts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Returns each optimizer with its settings in a description, where it has both."""
    parts = optimizer.chained_optimizers
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    return [(part, each["optimizer"]) for part, each in zip(parts, states, strict=True) if part.optimizer is not None]


def _plain(value: Any) -> bool:
    """Whether a value is a number, text, a truth value, None, or a list or tuple of these."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


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
