"""Events of evaluations that go on beside training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class EvaluationBegun(Event):
    """The policy after `step` training steps is being evaluated by `servers` servers that are set aside; training goes on."""

    name: ClassVar[str] = "evaluation begun"
    console: ClassVar[bool] = False  # once an evaluation; its end is shown
    step: int
    servers: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"evaluation after step {self.step} begun on {self.servers} servers, beside training"


@dataclass(frozen=True, slots=True)
class EvaluationAwaited(Event):
    """Training stands still until the evaluation after step `before` is done: the servers that it has are wanted for the next."""

    name: ClassVar[str] = "evaluation awaited"
    step: int
    before: int

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return (
            f"the evaluation after step {self.step} is due and the one after step {self.before} is not done: training stands "
            "still until it is. Set more eval.servers, a larger eval.every or fewer eval.samples"
        )


@dataclass(frozen=True, slots=True)
class EvaluationPostponed(Event):
    """The servers that held the weights after `step` training steps are lost; their evaluation is made up for."""

    name: ClassVar[str] = "evaluation postponed"
    step: int
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"evaluation after step {self.step} postponed to the end of the run, from its checkpoint: {self.reason}"


@dataclass(frozen=True, slots=True)
class EvaluationLost(Event):
    """Nothing holds the weights after `step` training steps any more: they cannot be evaluated."""

    name: ClassVar[str] = "evaluation lost"
    step: int
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        return f"the evaluation after step {self.step} is lost: {self.reason}"
