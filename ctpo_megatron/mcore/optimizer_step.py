"""What ChainedOptimizer.step does, with the checks between norm and update, and a value head apart from the policy.

The value head's gradient has a norm and a clip of its own, so a critic that is far off does not shrink the policy's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.mcore.optimizer import of_value_head
from ctpo_megatron.mcore.reduction import once
from ctpo_megatron.record.values import Max, Values

Group = dict[str, Any]  # of parameters, with their settings


def optimizer_step(
    optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler, *, has_value_head: bool = False, warming_up: bool = False
) -> Values:
    """Gradient norms before clipping, and learning rates, after the weights were moved.

    `warming_up`: the policy's learning rate is 0, so that none of its weights moves; moments take the gradients in. Raises
    NonFiniteError on every rank, with nothing changed, for a norm that is not finite.
    """
    optimizer.prepare_grads()
    kinds: dict[str, Callable[[Group], bool]] = {"": lambda group: not of_value_head(group)}
    if has_value_head:
        kinds["critic/"] = of_value_head
    norms = {}
    for kind, mine in kinds.items():
        with _only(optimizer, mine):
            norms[kind] = float(optimizer.get_grad_norm())
        require_finite(f"{kind}grad_norm", norms[kind])
    schedule.step(1)
    for kind, mine in kinds.items():
        with _only(optimizer, mine):
            _clip(optimizer, norms[kind])
    if warming_up:
        for group in optimizer.param_groups:
            if not of_value_head(group):
                group["lr"] = 0.0
    rates = {kind: next(float(group["lr"]) for group in optimizer.param_groups if mine(group)) for kind, mine in kinds.items()}
    optimizer.step_with_ready_grads()
    numbers = {f"{kind}{name}": of[kind] for kind in kinds for name, of in (("grad_norm", norms), ("lr", rates))}
    return {**once(numbers), "grad_norm_max": Max(norms[""])}


def require_finite(name: str, value: float) -> None:
    """Raise NonFiniteError for a NaN or an infinite number."""
    if not math.isfinite(value):
        raise NonFiniteError(f"{name} is {value}; the weights were left as they were before this step.")


def _clip(optimizer: MegatronOptimizer, norm: float) -> None:
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )


@contextmanager
def _only(optimizer: MegatronOptimizer, mine: Callable[[Group], bool]) -> Iterator[None]:
    """Inside it the optimizers know no other parameters than those of such groups. Only for norms and clipping."""
    parts = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
    whole = [part.param_groups for part in parts]
    for part, groups in zip(parts, whole, strict=True):
        part.param_groups = [group for group in groups if mine(group)]
    try:
        yield
    finally:
        for part, groups in zip(parts, whole, strict=True):
            part.param_groups = groups
