"""The trainer: optimizer, batch sizes, checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ctpo_megatron.config.base import Section


class OptimizerConfig(Section):
    """AdamW with a linear warm-up and then a constant or cosine rate."""

    lr: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay per step, times the learning rate."""
    clip_grad: PositiveFloat = 1.0
    """Largest norm of the gradient; above it the gradient is scaled down."""


class TrainConfig(Section):
    """How trajectories become optimizer steps."""

    steps: PositiveInt = 100
    """Rollout batches to train on."""
    prompts_per_step: PositiveInt = 32
    """Prompts of one rollout batch; each is sampled rollout.group_size times."""
    optimizer_steps: PositiveInt = 4
    """Optimizer steps per rollout batch; must divide prompts_per_step."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens packed into one forward-backward pass per data-parallel rank."""
    staleness: NonNegativeInt = 0
    """How many versions old the policy of a rollout may be when it is trained on. 0: strictly synchronous."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass. selective: those inside attention; full: of whole layers."""


class SftConfig(Section):
    """Supervised teaching of a format before reinforcement learning."""

    steps: PositiveInt = 1000
    """Largest number of optimizer steps."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step."""
    stop_loss: PositiveFloat | None = None
    """Stop when the smoothed loss per token falls below this. null: run all steps."""
    output: str | None = None
    """Where the model is written in Hugging Face format. null: RUN_DIR/model."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegativeInt = 0
    """Save after every so many steps. 0: never."""
    keep: PositiveInt = 2
    """How many checkpoints to keep."""
    export: bool = True
    """Write the final weights in Hugging Face format to RUN_DIR/model."""
