"""When the history of a run says that it has left its course."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ctpo_megatron.config.base import Section


class SpikeConfig(Section):
    """Loss spikes and collapses of the reward, told from the steps before them.

    A value is judged by how far it is from the median of the window, in the window's own deviations: 1.4826 times the median
    absolute deviation, which is the standard deviation of normal noise, and at least 2 % of the median.
    """

    loss: PositiveFloat | None = None
    """Deviations above the window's median at which the loss counts as a spike. null: not looked for; 10 is a quiet alarm."""
    reward: PositiveFloat | None = None
    """Deviations below the window's median at which the mean reward counts as collapsed. null: not looked for."""
    window: PositiveInt = Field(50, ge=4)
    """Training steps that a value is compared with: those before the steps that are judged."""
    least: PositiveInt = Field(10, ge=4)
    """Fewest steps of the window; before so many there is nothing to compare with."""
    patience: PositiveInt = 3
    """Steps in a row that have to be that far off. 1: a single step is enough."""
    returns: NonNegativeInt = 0
    """How often the run may go back to the newest checkpoint from before those steps, and go on with the prompts that follow. 0:
    it is told, and the run goes on as it is."""

    @model_validator(mode="after")
    def _window_holds_the_least(self) -> SpikeConfig:
        if self.least > self.window:
            raise ValueError(f"least={self.least} is above window={self.window}; allowed: up to it")
        return self
