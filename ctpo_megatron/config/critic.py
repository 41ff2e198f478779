"""The value function that a run may learn beside its policy."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from ctpo_megatron.config.base import Section


class CriticConfig(Section):
    """A value function on the policy's own layers: a linear map of the last hidden states; docs/critic.md."""

    weights: Literal["head", "shared"] = "shared"
    """What the value loss trains. head: the value head alone, so it moves no weight of the policy; shared: the policy's layers
    below it as well."""
    coeff: PositiveFloat = 0.5
    """Weight of the value loss in the loss."""
    clip: PositiveFloat | None = 0.2
    """How far a value may move from what it was before the update until the value loss stops rewarding it. null: no clip."""
    lr: PositiveFloat | None = None
    """Peak learning rate of the head, which follows optimizer.schedule in proportion. null: optimizer.lr, which is usually far
    too small for weights that begin at 0."""
    warmup_steps: NonNegativeInt = 0
    """Training steps at the beginning of the run in which the head alone learns; the policy's learning rate is 0 in them."""
