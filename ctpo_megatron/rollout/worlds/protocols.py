"""What an environment of your own is. Nothing here needs more than Python.

class Guess:                                    # rollout.environment.path: my.package:Guess
    tools = ()
    replayable = True

    def __init__(self, secret=7): ...           # rollout.environment.options
    async def reset(self, prompt): ...
    async def step(self, turn): ...
    async def close(self): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ctpo_megatron.types import Parsed, Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a world says to a turn of the assistant.

    `results` answer its calls, one text for each in their order; `text` is said in the user's role, after them. With `done` the
    episode ends, and what is said then nobody reads. Rewards of all steps are added up; None: this step has none.
    """

    text: str | None = None
    results: tuple[str, ...] = ()
    reward: float | None = None
    done: bool = False


class World(Protocol):
    """One episode. Each attempt has an object of its own, which is closed whatever becomes of the attempt."""

    tools: Sequence[dict[str, Any]]
    """What the model may call, in OpenAI's form; read after `reset`. Empty: the turns are text only."""
    replayable: bool
    """Whether the same turns get the same answers from a new object. Then an attempt that was interrupted goes on: its recorded
    turns are played to a new world. Otherwise it begins anew."""

    async def reset(self, prompt: Prompt) -> str | None:
        """Begin. Returns what is said to the model after the messages of `prompt`, in the user's role; None: nothing."""
        ...

    async def step(self, turn: Parsed) -> StepResult:
        """Returns what follows a turn of the assistant."""
        ...

    async def close(self) -> None:
        """Give up what it holds. It is called once, also before `reset` and after an error."""
        ...


@runtime_checkable
class GroupRewards(Protocol):
    """A world that judges all attempts at a prompt together, once all of them are done."""

    async def group_rewards(self, prompt: Prompt, trajectories: Sequence[Trajectory]) -> Sequence[float]:
        """Returns a reward for each; `trajectories` hold those that their steps gave. Called on an object of its own."""
        ...


Worlds = Callable[[], World]
