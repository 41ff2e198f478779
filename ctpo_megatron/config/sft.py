"""Supervised training on demonstrations: how long, on which turns, and what it is measured on."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ctpo_megatron.config.base import FilePath, Section

UNBOUNDED_STEPS = 1000  # where neither steps nor epochs are given


class SftConfig(Section):
    """Supervised training on demonstrations (docs/sft.md), by itself or before reinforcement learning."""

    steps: PositiveInt | None = None
    """Largest number of optimizer steps. null: as many as `epochs` takes, or 1,000 without it."""
    epochs: PositiveInt | None = None
    """How often each demonstration is trained on; of a mixture, as often as that many examples make. null: `steps` says when it
    ends."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step."""
    turns: Literal["last", "all"] = "last"
    """What is trained on: what the assistant says after the last user message, or after each of them."""
    stop_loss: PositiveFloat | None = None
    """Stop when the smoothed loss per token falls below this. null: run all steps."""
    eval: FilePath | None = None
    """Held-out demonstrations, on which the loss is measured and nothing is trained. null: none."""
    eval_every: NonNegativeInt = 0
    """Measure that loss after every so many steps, and at the end. 0: at the end only."""
    patience: PositiveInt | None = None
    """Stop after so many such measurements in a row that are no better than the best one, and export the weights of the best,
    which are kept as a checkpoint. null: run all steps, and export the last weights."""
    output: FilePath | None = None
    """Where the model is written in Hugging Face format. null: RUN_DIR/model."""

    @model_validator(mode="after")
    def _patience_has_something_to_look_at(self) -> SftConfig:
        for key, needs in (("eval_every", self.eval_every), ("patience", self.patience)):
            if needs and self.eval is None:
                raise ValueError(f"sft.{key}={needs} needs held-out demonstrations; set sft.eval to a file of them")
        if self.patience and not self.eval_every:
            raise ValueError(f"sft.patience={self.patience} counts measurements; set sft.eval_every to the steps between two")
        return self

    def total_steps(self, examples: int, *, done: int = 0, drawn: int = 0) -> int:
        """Returns the optimizer steps of a whole run on so many demonstrations, unless it stops before its time.

        `done`: steps that were made, of which `drawn` examples were.
        """
        wanted = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            left = max(0, self.epochs * examples - drawn)
            wanted.append(done + math.ceil(left / self.per_step(examples)))
        return min(wanted, default=UNBOUNDED_STEPS)

    def per_step(self, examples: int) -> int:
        """Returns the examples of an optimizer step; the last one of the last epoch may have fewer."""
        return min(self.batch_size, examples)
