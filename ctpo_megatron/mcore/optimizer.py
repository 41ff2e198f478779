"""Megatron-Core's optimizer and learning-rate schedule."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError


def build_optimizer(models: list[torch.nn.Module], config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizer:
    """AdamW whose state is sharded over the data-parallel ranks. Call it after the weights were loaded: it copies bf16 ones."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(settings, models, use_gloo_process_groups=False)


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int | None) -> OptimizerParamScheduler:
    """Linear warm-up, then a constant rate or a cosine that would reach 0 one step after `total_steps`.

    Advance it before each optimizer step: step k of w warm-up steps then runs at lr * k / w.
    """
    if config.schedule == "cosine" and (total_steps is None or total_steps < config.warmup_steps):
        raise ConfigError(
            f"optimizer.schedule is cosine with optimizer.warmup_steps = {config.warmup_steps}, "
            f"but the run has {total_steps} optimizer steps; it needs at least as many as the warm-up."
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=0.0,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps or 0, config.warmup_steps) + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
