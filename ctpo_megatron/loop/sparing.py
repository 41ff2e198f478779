"""Whether samples without an advantage may go without a pass in a run: the rule, by name."""

from __future__ import annotations

from ctpo_megatron.config import RunConfig
from ctpo_megatron.models.shape import ModelShape


def wants_every_sample(config: RunConfig, shape: ModelShape) -> str | None:
    """Returns what has a gradient where the advantage is zero, or asks for every sample; None where nothing does."""
    moe, experts = config.moe, shape.experts
    reasons = {
        "train.spare is false": not config.train.spare,
        "algorithm.advantage": config.algorithm.gae is not None,
        "algorithm.reference": config.algorithm.reference is not None,
        "algorithm.distillation": config.algorithm.distillation is not None,
        "algorithm.objective": config.algorithm.objective.acts_without_advantage,
    }
    if experts is not None:
        aux = experts.aux_loss_coeff if moe.aux_loss_coeff is None else moe.aux_loss_coeff
        reasons |= {
            "moe.aux_loss_coeff": aux > 0,
            "moe.z_loss_coeff": moe.z_loss_coeff > 0,
            "moe.bias_update_rate": moe.bias_update_rate > 0,
        }
    return next((reason for reason, holds in reasons.items() if holds), None)
