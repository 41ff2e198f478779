"""What plays an attempt: the seam between the environment and the kinds of agents."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.errors import RolloutError


class AgentFailed(RolloutError):
    """An agent failed for a reason of its own; what the model said by then may still count (rollout.agent.on_failure)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent says at its end. `text` is judged, None: the last that the model wrote; unless there is a `reward`."""

    text: str | None = None
    reward: float | None = None


class AgentRunner(Protocol):
    """One kind of agents."""

    @property
    def place(self) -> AbstractAsyncContextManager[object]:
        """Returns what is held while an attempt is played: it waits while as many are played as there is room for."""
        ...

    async def play(self, task: AgentTask) -> Answer:
        """Returns what the agent says when it has ended.

        Raises AgentFailed. When this is cancelled, the agent is ended before it returns.
        """
        ...

    async def close(self) -> None:
        """End what still runs."""
        ...
