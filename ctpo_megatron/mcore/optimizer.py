"""Megatron-Core's optimizer and learning-rate schedule."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ctpo_megatron.config.critic import CriticConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore.model.value_head import MARK

ENDLESS = 2**62  # steps; a schedule without an end of its own never gets there


def check_optimizer(config: OptimizerConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError for what needs a GPU, TransformerEngine or 16-bit weights where they are missing."""
    if config.cpu_offload and device.type != "cuda":
        raise ConfigError(
            f"optimizer.cpu_offload = {config.cpu_offload} moves the optimizer's state from a GPU to the host's memory, "
            f"but the trainer runs on {device.type}, where it already is; set it to 0."
        )
    has_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    if config.cpu_offload and not has_transformer_engine:
        raise ConfigError(
            f"optimizer.cpu_offload = {config.cpu_offload} needs the package transformer_engine, which is not installed; "
            "set it to 0."
        )
    if config.cpu_offload and dtype != torch.bfloat16:
        raise ConfigError(
            f"optimizer.cpu_offload = {config.cpu_offload} is for bfloat16 weights: megatron-core 0.16.1 cannot build an "
            f"offloaded optimizer of {str(dtype).removeprefix('torch.')} ones; set model.dtype, or cpu_offload to 0."
        )
    if not config.precision_aware:
        return
    if device.type != "cuda" or not has_transformer_engine:
        raise ConfigError(
            "optimizer.precision_aware needs the FusedAdam of TransformerEngine, that is a GPU and the package "
            f"transformer_engine; the trainer runs on {device.type}"
            + ("." if device.type != "cuda" else " and the package is not installed.")
            + " Set it to false."
        )
    if dtype != torch.bfloat16:
        raise ConfigError(f"optimizer.precision_aware is for bfloat16 weights, but the trainer's are {dtype}; set model.dtype.")


def build_optimizer(
    models: list[torch.nn.Module], config: OptimizerConfig, dtype: torch.dtype, critic: CriticConfig | None = None
) -> MegatronOptimizer:
    """AdamW whose state is sharded over the data-parallel ranks. Call it after the weights were loaded: it copies bf16 ones.

    All of its state is there when this returns, so that what shares the device finds the memory that is left for good. `critic`:
    whose value head the model has; it has a learning rate of its own and no weight decay.
    """
    settings = optimizer_settings(config, dtype)
    settings.overlap_param_gather = models[0].ddp_config.overlap_param_gather  # type: ignore[union-attr]  # megatron's wrapper
    groups = get_standard_config_overrides(settings)
    if critic is not None:
        rate = config.lr if critic.lr is None else critic.lr
        lowest = config.min_lr * rate / config.lr if config.lr else 0.0
        # the third is one of the four by which a checkpoint tells parameter groups apart
        groups[ParamKey(attr=MARK)] = {"max_lr": rate, "min_lr": lowest, "is_decoupled_lr": True, "wd_mult": 0.0}
    optimizer = get_megatron_optimizer(settings, models, config_overrides=groups, use_gloo_process_groups=False)
    begin_state(optimizer)
    return optimizer


def of_value_head(group: dict[str, Any]) -> bool:
    """Whether a parameter group is that of a value head."""
    return bool(group["is_decoupled_lr"])


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer the state that it would make in its first step, where it has none yet."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if adam is None or adam.state:  # None: this rank has no parameters of the kind
            continue
        if not isinstance(adam, HybridDeviceOptimizer):
            _begin(adam)
            continue
        for each in adam.sub_optimizers:
            _begin(each)
        adam._sync_sub_optimizers_state_to_hdo()  # as each of its steps ends


def _begin(adam: Any) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if hasattr(adam, "initialize_state"):  # TransformerEngine's, which knows its number formats
                adam.initialize_state(parameter, False)
                continue
            adam.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            if isinstance(adam, torch.optim.Adam):
                place = parameter.device if group.get("fused") else torch.device("cpu")
                adam.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=place)


def optimizer_settings(config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizerConfig:
    """megatron's settings of AdamW for weights of `dtype`."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
        # megatron's offloaded optimizer takes the gradients of the precision-aware path
        # a float32 copy of the weights: checkpoints of the 16-bit remainders could not be loaded, and would not hold the weights
        store_param_remainders=False,
        use_precision_aware_optimizer=config.precision_aware or config.cpu_offload > 0,
        exp_avg_dtype=getattr(torch, config.exp_avg_dtype),
        exp_avg_sq_dtype=getattr(torch, config.exp_avg_sq_dtype),
        optimizer_cpu_offload=config.cpu_offload > 0,
        optimizer_offload_fraction=config.cpu_offload,
        overlap_cpu_optimizer_d2h_h2d=config.cpu_offload > 0,
    )


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int | None) -> OptimizerParamScheduler:
    """Linear warm-up, then the schedule; those that fall would reach `min_lr` one step after `total_steps`.

    Advance it before each optimizer step: step k of w warm-up steps then runs at lr * k / w. Raises ConfigError for a schedule
    that has to know the number of steps and does not fit into it.
    """
    config.check_length(total_steps)
    ends = config.schedule in ("cosine", "linear", "wsd")
    end = total_steps + 1 if ends and total_steps is not None else ENDLESS
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=end,
        lr_decay_style="WSD" if config.schedule == "wsd" else config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=config.wsd_decay_steps,
        lr_wsd_decay_style=config.wsd_decay,
    )
