"""Events about the weights that correct for the distance between trainer and engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class WeightsShrunk(Event):
    """The weights of `algorithm.correction` leave little of a batch: `metric` fell below `limit`. Told once until it recovers."""

    name: ClassVar[str] = "weights shrunk"
    step: int
    metric: str
    value: float
    limit: float
    log_weight: float  # mean over tokens, before weights are held to a range or masked
    advice: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return (
            f"algorithm.correction leaves little of the batch at step {self.step}: {self.metric} is {self.value:.3g}, below "
            f"{self.limit:g}; the mean log-weight is {self.log_weight:.3g} nats. {self.advice}"
        )
