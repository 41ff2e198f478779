"""Attempts of agents from elsewhere: opened for a task, closed with a verdict, kept on disk while they are open.

    RUN_DIR/attempts/NAME.json   the task, its key, and when it was opened; only its owner may read it
    RUN_DIR/attempts/NAME.tree   what was sampled, after each turn
    RUN_DIR/attempts.next        the number of the next one
    RUN_DIR/rollouts/agents.jsonl   what attempts came to, a line each

So a server that is started again goes on with those that are open: their keys stay, and so does their time. One that was closed
is told again as it was, to who did not hear it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ctpo_megatron.agents.conversation.conversation import Bounds, Conversation
from ctpo_megatron.agents.conversation.trajectory import trajectory_of, written
from ctpo_megatron.agents.conversation.tree import Tree
from ctpo_megatron.agents.http.keys import new_key
from ctpo_megatron.agents.play.environment import Endpoint
from ctpo_megatron.agents.protocols import Message
from ctpo_megatron.errors import RolloutError, storing
from ctpo_megatron.record.files import GrowingFile, drop_half_line
from ctpo_megatron.record.trajectories import as_row
from ctpo_megatron.rollout.judged import outcome_as, with_score
from ctpo_megatron.rollout.protocols import Generator, Outcome, Reward, Sampling, Score
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, Trajectory

LOOK_S = 1.0  # how often it is looked for attempts whose time is over


class NoSuchAttempt(Exception):
    """There is no open attempt of this name."""


class TooMany(Exception):
    """No further attempt may be opened before another one is closed."""


@dataclass(frozen=True, slots=True)
class Closed:
    """What an attempt came to. `turns`: those that were sampled, on all branches; `status` is None where none was."""

    status: str | None = None
    reward: float = 0.0
    turns: int = 0
    branches: int = 0


class NoAnswer(Exception):
    """An attempt cannot be graded: it was opened without the answer to its task."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an attempt was opened with, as it is on disk."""

    number: int
    key: str
    opened: float  # seconds since the epoch
    messages: list[Message]
    answer: str | None = None

    @property
    def id(self) -> AttemptId:
        """Returns its name."""
        return AttemptId(GroupId(self.number), 0)


@dataclass(slots=True)
class _Open:
    told: Told
    conversation: Conversation
    deadline: float  # on the clock of the event loop


class OpenAttempts:
    """The attempts that are open. `sampling`: how they are sampled; `timeout_s`: how long each may be open.

    `most`: how many at a time. Attempts that an earlier process left open are open again.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        generator: Generator,
        reward: Reward,
        run_dir: Path,
        *,
        sampling: Sampling,
        timeout_s: float,
        most: int,
    ) -> None:
        self._endpoint, self._generator, self._reward = endpoint, generator, reward
        self._sampling, self._timeout_s, self._most = sampling, timeout_s, most
        self._directory, self._rows = run_dir / "attempts", run_dir / "rollouts" / "agents.jsonl"
        self._counter = run_dir / "attempts.next"
        with storing(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._rows.parent.mkdir(parents=True, exist_ok=True)
            drop_half_line(self._rows)
        self._file = GrowingFile(self._rows)
        self._open: dict[str, _Open] = {}
        self._closing: dict[str, asyncio.Event] = {}  # set when each is closed, or could not be
        self._next = 0
        self._restore()

    @property
    def open(self) -> dict[str, float]:
        """Returns the names of those that are open, and for how many seconds each may be still."""
        now = asyncio.get_running_loop().time()
        return {name: each.deadline - now for name, each in self._open.items()}

    def begin(self, messages: Sequence[Message], answer: str | None) -> Told:
        """Returns a new attempt at a task, with its key. Raises TooMany, StorageError."""
        if len(self._open) >= self._most:
            raise TooMany(f"{self._most} attempts are open (rollout.agent.max_open); close one first")
        told = Told(self._next, new_key(), time.time(), list(messages), answer)
        self._next += 1
        _write(self._counter, str(self._next).encode())
        _write(self._path(told, "json"), msgspec.json.encode(told))
        self._take(told, Tree(str(told.id)))
        return told

    async def close(
        self, name: str, *, reward: float | None = None, text: str | None = None, late: bool = False
    ) -> Trajectory | None:
        """Returns what the attempt `name` came to, which is on disk then; None where nothing was sampled in it.

        `reward`: what it is worth; None: `text` is graded, or what the model wrote. Raises NoSuchAttempt, NoAnswer, StorageError,
        and RolloutError where it is open still, since nobody came to a verdict.
        """
        while (under_way := self._closing.get(name)) is not None:
            await under_way.wait()
        each = self._open.get(name)
        if each is None:
            raise NoSuchAttempt(f"no attempt {name!r} is open")
        if reward is None and each.told.answer is None and not late:
            raise NoAnswer(f"attempt {name} was opened without `answer`, so it cannot be graded; close it with a `reward`")
        self._closing[name] = asyncio.Event()
        try:
            self._endpoint.episodes.remove(each.told.key)
            await each.conversation.close()
            made = await self._judged(each, reward, text, late)
            if made is not None:
                self._file.append_line(json.dumps(as_row(_prompt(each.told), made)))
            for kind in ("json", "tree"):
                self._path(each.told, kind).unlink(missing_ok=True)
            del self._open[name]
        finally:
            self._closing.pop(name).set()
        return made

    def closed(self, name: str) -> Closed | None:
        """Returns what an attempt that is not open any more came to; None where there never was one of this name."""
        number = name.removeprefix("g").partition(".")[0]
        known = number.isascii() and number.isdigit() and int(number) < self._next and name == _name(int(number))
        if not known or name in self._open:
            return None
        for row in _rows(self._rows):
            if row["id"] == name:
                return _closed_as(row)
        return Closed()

    async def close_late_ones(self) -> None:
        """Close attempts when their time is over, until this is cancelled."""
        while True:
            late = [name for name, left_s in self.open.items() if left_s <= 0]
            for name in late:
                with contextlib.suppress(NoSuchAttempt):
                    await self.close(name, late=True)
            await asyncio.sleep(LOOK_S)

    async def leave(self) -> None:
        """End what is being sampled; all that is open stays on disk."""
        for each in self._open.values():
            self._endpoint.episodes.remove(each.told.key)
            await each.conversation.close()
            self._keep(each.told, each.conversation.tree)
        self._file.close()

    async def _judged(self, each: _Open, reward: float | None, text: str | None, late: bool) -> Trajectory | None:
        tree, told = each.conversation.tree, each.told
        if not any(turn.whole for turn in tree.turns):
            return None
        made = trajectory_of(tree, self._endpoint.chat, told.id, told.number)
        if late:
            made.status = Status.DEADLINE
        if made.status is Status.UNANSWERED and (text is not None or reward is not None):
            made.status = Status.FINISHED  # who closes it says so
        if reward is not None:
            score = Score(reward)
        elif told.answer is None:
            score = Score(0.0, undecided=True, why="the attempt was opened without an answer and closed without a reward")
        else:
            said = "" if made.status is Status.UNANSWERED else written(tree, self._endpoint.chat)
            said = said if text is None else text
            score = await self._score(told, outcome_as(said, made, self._endpoint.chat), late)
        seconds = time.time() - told.opened
        return replace(with_score(made, score), seconds=seconds)

    async def _score(self, told: Told, outcome: Outcome, late: bool) -> Score:
        """Returns the verdict. Raises RolloutError where nobody gives one and it can be asked for again: not of a `late` one."""
        try:
            return await self._reward.score(_prompt(told), outcome)
        except RolloutError as error:
            if not late:
                raise
            return Score(0.0, undecided=True, why=str(error))

    def _take(self, told: Told, tree: Tree) -> None:
        left_s = told.opened + self._timeout_s - time.time()
        deadline = asyncio.get_running_loop().time() + left_s
        context = self._endpoint.max_prompt_tokens + self._sampling.max_response_tokens
        conversation = Conversation(
            tree,
            self._generator,
            self._endpoint.chat,
            self._endpoint.parser,
            Bounds(self._sampling, context, deadline),
            session=told.number,
            changed=partial(self._keep, told, tree),
        )
        self._open[str(told.id)] = _Open(told, conversation, deadline)
        self._endpoint.episodes.add(told.key, conversation)

    def _keep(self, told: Told, tree: Tree) -> None:
        _write(self._path(told, "tree"), tree.dump())

    def _path(self, told: Told, kind: str) -> Path:
        return self._directory / f"{told.id}.{kind}"

    def _restore(self) -> None:
        closed = {row["id"] for row in _rows(self._rows)}
        self._next = 1 + max((int(name.partition(".")[0][1:]) for name in closed), default=-1)
        if self._counter.exists():
            self._next = max(self._next, int(self._counter.read_bytes()))
        for path in sorted(self._directory.glob("*.json")):
            told = msgspec.json.decode(path.read_bytes(), type=Told)
            tree = self._path(told, "tree")
            if str(told.id) in closed:  # the process ended between the two
                path.unlink()
                tree.unlink(missing_ok=True)
                continue
            self._take(told, Tree.parse(tree.read_bytes()) if tree.exists() else Tree(str(told.id)))
            self._next = max(self._next, told.number + 1)


def _name(number: int) -> str:
    return str(AttemptId(GroupId(number), 0))


def _prompt(told: Told) -> Prompt:
    return Prompt(told.number, tuple(told.messages), told.answer or "")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _closed_as(row: dict[str, Any]) -> Closed:
    branches = row.get("branches", [])
    turns = [turn for sample in (row, *branches) for turn in sample["turns"] if turn["role"] == "assistant"]
    return Closed(row["status"], row["reward"], len(turns), len(branches))


def _write(path: Path, data: bytes) -> None:
    """Put `data` in place of the file, which only its owner may read. Raises StorageError."""
    fresh = path.with_suffix(".new")
    opener: Callable[[str, int], int] = partial(os.open, mode=0o600)
    with storing(path):
        with open(fresh, "wb", opener=opener) as file:
            file.write(data)
        os.replace(fresh, path)


def prompt_of(body: Any) -> tuple[list[Message], str | None]:
    """Returns messages and answer of a request for an attempt. Raises ValueError, which says what is needed."""
    if not isinstance(body, dict) or not set(body) <= {"messages", "answer"}:
        raise ValueError('needed: {"messages": [{"role": "user", "content": "..."}], "answer": "..."}; `answer` is for grading')
    messages, answer = body.get("messages", []), body.get("answer")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError("`messages` is a list of objects with `role` and `content`")
    if answer is not None and not isinstance(answer, str):
        raise ValueError("`answer` is text, or null where the attempt is closed with a reward")
    return messages, answer
