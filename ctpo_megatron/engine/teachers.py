"""Teachers on SGLang servers, of this run or of others: token ids in, the log-probs of these very tokens out. No text.

what happened                                        then
no connection, no answer in time, 500 on, no JSON    sent again after a pause, to the next of the teacher's servers
the last try too                                     TeacherFailed, with teacher, server and reason: the attempt has failed
a token that the teacher has no row for              the same, and nothing is sent: SGLang 0.5.23 would answer with nonsense
an answer of 400 to 499                              EngineRefused: such a request can never be served
other tokens, or a log-prob that is not finite       EngineError: this is no answer to what was asked
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from ctpo_megatron.config.distillation import AskedTeacher, ServedTeacher
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.http import Answer, ask, open_session
from ctpo_megatron.errors import ConfigError, EngineError, EngineRefused, TeacherFailed
from ctpo_megatron.types import FailedAttempt, Trajectory, TrajectoryGroup, Turn

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
UNNAMED = 0  # what SGLang 0.5.23 calls the last token of a vocabulary in `input_token_logprobs`
NextUrl = Callable[[], Awaitable[str]]
"""Says which of a teacher's servers the next request goes to, as soon as there is one."""


def in_turn(urls: Sequence[str]) -> NextUrl:
    """Returns what names the `urls` one after the other."""
    turns = itertools.cycle(urls)

    async def following() -> str:
        return next(turns)

    return following


def serving(fleet: Fleet) -> NextUrl:
    """Returns what names the servers of `fleet` that serve, and waits where none does. It raises NoServerLeft as that does."""
    turns = itertools.count()

    async def following() -> str:
        lease = await fleet.acquire(next(turns))
        fleet.done(lease)
        return lease.member.url

    return following


class TeacherClient:
    """The servers of one teacher; an async context manager.

    `key`: what they ask for; empty: nothing. `rows`: how many tokens the teacher has; None: it is not known.
    """

    def __init__(self, teacher: AskedTeacher, next_url: NextUrl, key: str = "", rows: int | None = None) -> None:
        self.teacher, self._next_url, self._key, self._rows = teacher, next_url, key, rows
        self._slots = asyncio.Semaphore(teacher.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self.seconds: list[float] = []  # of each request since they were last taken
        self.retries = 0  # since then

    async def __aenter__(self) -> TeacherClient:
        self._session = open_session(self._key, reuse=True)
        return self

    async def __aexit__(self, *_error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def logp(self, token_ids: Sequence[int], begin: int) -> list[float]:
        """Log-probs of `token_ids[begin:]`, each given all tokens before it, at temperature 1. `begin` is at least 1.

        Raises TeacherFailed, EngineRefused and EngineError as the module's table says.
        """
        if self._rows is not None and max(token_ids) >= self._rows:
            raise TeacherFailed(f"teacher {self.teacher.name!r} has {self._rows} tokens, and none with id {max(token_ids)}")
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": begin - 1,  # SGLang says nothing of that token itself
        }
        async with self._slots:
            begun = time.monotonic()
            url, answer = await self._answer(body)
            self.seconds.append(time.monotonic() - begun)
        return _read(answer, token_ids[begin:], self._named(url))

    def _named(self, url: str) -> str:
        return f"teacher {self.teacher.name!r} at {url}"

    async def _answer(self, body: dict[str, Any]) -> tuple[str, Any]:
        """Returns which server has answered, and what."""
        if self._session is None:
            raise EngineError(f"teacher {self.teacher.name!r} cannot be asked: its client was not entered")
        teacher, pause_s = self.teacher, FIRST_PAUSE_S
        for left in range(teacher.retries, -1, -1):
            url = await self._next_url()
            answer = await ask(self._session, "POST", f"{url}/generate", body, teacher.timeout_s)
            if isinstance(answer, Answer):
                return url, answer.value
            if answer.kind == "refused":
                raise EngineRefused(f"{self._named(url)} refused what it was asked: {answer.message}")
            if not left:
                raise TeacherFailed(f"{self._named(url)} did not answer, tried {teacher.retries + 1} times: {answer.message}")
            self.retries += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise AssertionError("the last try returns or raises")


class AskedTeachers:
    """All teachers on servers, by their places; an async context manager. `teacher_of`: the place for a source of prompts."""

    def __init__(self, clients: Mapping[int, TeacherClient], teacher_of: Callable[[str], int | None]) -> None:
        self._clients, self._teacher_of = clients, teacher_of
        self._open = AsyncExitStack()

    async def __aenter__(self) -> AskedTeachers:
        for client in self._clients.values():
            await self._open.enter_async_context(client)
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._open.aclose()

    async def teach(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """Returns the group with its teacher's log-probs in the policy's turns, those of branches too.

        As it is where its teacher is on no server; as a failed group, with the reasons, where one did not answer. Raises
        EngineRefused and EngineError as `TeacherClient.logp` does.
        """
        place = self._teacher_of(group.prompt.source)
        if place is None or place not in self._clients:
            return group
        asked = [_taught(self._clients[place], made) for made in group.trajectories]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        taught = [end for end in ends if isinstance(end, Trajectory)]
        if len(taught) == len(ends):
            return replace(group, trajectories=taught)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, TeacherFailed):
                raise end
        failed = [_failed(made, end) for made, end in zip(group.trajectories, ends, strict=True)]
        return replace(group, trajectories=[], failed=failed)

    def metrics(self) -> dict[str, float]:
        """Returns scalars about the requests since it was last asked."""
        seconds = [each for client in self._clients.values() for each in client.seconds]
        retries = sum(client.retries for client in self._clients.values())
        for client in self._clients.values():
            client.seconds, client.retries = [], 0
        return {"teacher/retries": float(retries)} | ({"teacher/seconds": sum(seconds) / len(seconds)} if seconds else {})


def _failed(made: Trajectory, end: Trajectory | BaseException) -> FailedAttempt:
    """An attempt of a group that failed, because it ended in an error or another one did."""
    aborted = isinstance(end, Trajectory)
    reason = "another attempt of its group failed" if aborted else str(end)
    return FailedAttempt(made.id, reason, aborted, made.response_length, made.reward)


async def _taught(client: TeacherClient, made: Trajectory) -> Trajectory:
    """A copy of an attempt with what the teacher says of it, and of its branches."""
    turns = await _told(client, made.prompt_ids, made.turns)
    branches = [replace(each, turns=await _told(client, each.prompt_ids, each.turns)) for each in made.branches]
    return replace(made, turns=turns, branches=branches)


async def _told(client: TeacherClient, prompt_ids: list[int], turns: list[Turn]) -> list[Turn]:
    """Copies of a sample's turns with `teacher_logp`: one request for all of them."""
    if not any(turn.role == "assistant" and turn.token_ids for turn in turns):
        return turns
    tokens = [*prompt_ids, *(token for turn in turns for token in turn.token_ids)]
    logp = iter(await client.logp(tokens, len(prompt_ids)))
    said = [list(itertools.islice(logp, len(turn.token_ids))) for turn in turns]
    return [replace(turn, teacher_logp=own) if turn.role == "assistant" else turn for turn, own in zip(turns, said, strict=True)]


def read_key(teacher: ServedTeacher) -> str:
    """The key of a teacher's servers; empty where none is sent. Raises ConfigError for a file that holds none."""
    if teacher.key_file is None:
        return ""
    try:
        key = Path(teacher.key_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_setting(teacher)} cannot be read: {type(error).__name__}") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{_setting(teacher)}: needed is a file with one key in it, and nothing else")
    return key


def _setting(teacher: ServedTeacher) -> str:
    return f"algorithm.distillation: teacher {teacher.name!r}: key_file={teacher.key_file}"


def _read(answer: Any, wanted: Sequence[int], server: str) -> list[float]:
    """The log-probs of the `wanted` tokens in an answer. Raises EngineError where they are of other tokens, or not finite."""
    try:
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        found = [(entry[0], entry[1]) for entry in entries]
    except (KeyError, TypeError, IndexError) as error:
        raise EngineError(f"{server} answered without input_token_logprobs; it has to be SGLang's /generate") from error
    if len(found) != len(wanted) or any(said not in (token, UNNAMED) for (_, said), token in zip(found, wanted, strict=True)):
        raise EngineError(f"{server} gave log-probs of {len(found)} tokens, and not of the {len(wanted)} that it was asked for")
    for place, (value, token) in enumerate(found):
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise EngineError(f"{server} gave the log-prob {value} to token {token}, number {place} of those asked for")
    return [float(value) for value, _ in found]
