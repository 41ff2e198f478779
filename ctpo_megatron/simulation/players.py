"""What an attempt meets in the real `ToolEnvironment`: a chat, a tool and a reward that only count tokens and take time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import Generator, Outcome, Score, ToolResult
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.speeds import Speeds
from ctpo_megatron.simulation.tokens import STOP, Written, as_list
from ctpo_megatron.simulation.workload import Said, Script, Workload
from ctpo_megatron.types import AttemptId, Prompt


@dataclass(slots=True)
class Playing:
    """An attempt that is under way: its script, and how many turns of the model are complete."""

    script: Script
    turn: int = 0
    tries: int = 0

    @property
    def said(self) -> Said:
        """Returns the turn that is next."""
        return self.script.turns[min(self.turn, len(self.script.turns) - 1)]

    @property
    def last(self) -> bool:
        """Returns whether that is its last one."""
        return self.turn >= len(self.script.turns) - 1


Book = dict[int, Playing]
"""Attempts under way, by the session that their requests belong to."""


class CountedChat:
    """Between counted tokens and the words that tool and reward read."""

    @property
    def stop_token_ids(self) -> list[int]:
        """Returns the token that ends a turn."""
        return [STOP]

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Returns as many tokens as the message says that it has."""
        return as_list(range(messages[0]["tokens"]))

    def tool_ids(self, text: str, *, earlier: Sequence[str] = (), end: int | None = None) -> list[int]:
        """Returns as many tokens as `text`, a number, says."""
        return as_list(range(int(text)))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns what a turn of the model says to tool and reward."""
        return ids.text if isinstance(ids, Written) else ""


def words_of(session: int, playing: Playing) -> str:
    """Returns what the turn that is complete says: a call that names the size of its answer, or what the attempt earns."""
    if playing.said.tool is not None:
        return f"```python\n{playing.said.tool}\n```"
    return f"{session} {playing.script.reward}"


class TimedTool:
    """A tool whose calls take `speeds.tool_s`."""

    def __init__(self, speeds: Speeds, host: Host) -> None:
        self._seconds, self._host = speeds.tool_s, host
        self._slots = asyncio.Semaphore(speeds.tool_slots)

    async def run(self, code: str) -> ToolResult:
        """Returns as an output how many tokens it has."""
        async with self._slots:
            if self._seconds:
                await self._host.work(self._seconds)
        return ToolResult(code.strip(), True, self._seconds)


class ScriptedReward:
    """Gives what the script says; fails in a `failing` share of tries, as a sandbox or a reward does."""

    def __init__(self, book: Book, failing: float, seed: int) -> None:
        self._book, self._failing, self._seed = book, failing, seed

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Returns the score. Raises RolloutError for a try that fails."""
        session, _, reward = outcome.text.rpartition("\n")[2].partition(" ")
        playing = self._book[int(session)] if session.isdigit() else None
        if playing is None:
            return Score(0.0)  # it was cut before its last turn
        playing.tries += 1
        if self._failing and Random(f"{self._seed}/{session}/{playing.tries}").random() < self._failing:
            raise RolloutError("a simulated failure")
        return Score(float(reward))


class ScriptedEnvironment(ToolEnvironment):
    """The real environment, over attempts that follow the scripts of a workload. `size`: of a group."""

    def __init__(
        self,
        generator: Generator,
        tool: TimedTool,
        reward: ScriptedReward,
        workload: Workload,
        book: Book,
        size: int,
        meter: Meter,
    ) -> None:
        super().__init__(generator, CountedChat(), tool, reward)
        self._workload, self._book, self._size, self._meter = workload, book, size, meter

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        """Returns an attempt at `prompt`, and notes what it is going to say."""
        with self._meter:
            group, number = attempt.group.number, attempt.number
            self._book[group * self._size + number] = Playing(self._workload.script(prompt.index, group, number))
        return super().begin(prompt, attempt)
