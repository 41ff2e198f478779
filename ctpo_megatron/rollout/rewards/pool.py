"""Processes that judge answers, and the requests that wait for them.

At the end of a rollout a hundred answers come within milliseconds, and a round trip between two processes for each takes longer
than a quick judge needs. So a process is given several requests at a time, as many as it should have judged within `AHEAD_S`:
one where judging takes long, so that no answer waits behind another while a process is idle.

A process says with each answer how long it took: `0.000042 {"reward": 1.0}`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ctpo_megatron.rollout.rewards.process import Late, Lost, Worker

AHEAD_S = 0.01  # of work that a process is given at a time
MOST = 64  # requests at a time
FORGET = 0.8  # what an answer leaves of the seconds of the slowest before it


@dataclass(frozen=True, slots=True)
class _Request:
    line: bytes
    answer: asyncio.Future[bytes]


class Pool:
    """Asks `count` processes that run `command`, each from when it is first needed. Close it to end them.

    `what` they are, for errors; `timeout_s` for each answer.
    """

    def __init__(self, command: Sequence[str], what: str, *, count: int, start_timeout_s: float, timeout_s: float) -> None:
        self._workers = [Worker(command, what, start_timeout_s) for _ in range(count)]
        self._idle = list(self._workers)
        self._waiting: deque[_Request] = deque()
        self._timeout_s = timeout_s
        self._slowest_s = AHEAD_S  # of the last answers; before there are any, one is asked for at a time
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, request: bytes) -> bytes:
        """Returns the line that answers `request`. Raises Lost where none comes in time, RolloutError where no process starts."""
        loop = asyncio.get_running_loop()
        asked = _Request(request, loop.create_future())
        self._waiting.append(asked)
        if len(self._waiting) == 1:
            loop.call_soon(self._hand_out)  # with what else comes in this turn of the loop
        return await asked.answer

    def close(self) -> None:
        """End the processes, and give up what waits for them."""
        for request in self._waiting:
            request.answer.cancel()
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        for worker in self._workers:
            worker.close()

    def _hand_out(self) -> None:
        """Give what waits to processes that are idle, the last one used first."""
        while self._idle and (batch := self._next()):
            task = asyncio.create_task(self._judge(self._idle.pop(), batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> list[_Request]:
        """Returns the requests for one process, whose callers still wait."""
        while self._waiting and self._waiting[0].answer.done():
            self._waiting.popleft()
        share = -(-len(self._waiting) // max(1, len(self._idle)))  # so that all idle ones have a part
        count = min(share, MOST, max(1, int(AHEAD_S / self._slowest_s)))
        batch = [self._waiting.popleft() for _ in range(count)]
        return [request for request in batch if not request.answer.done()]

    async def _judge(self, worker: Worker, batch: list[_Request]) -> None:
        """Let a process answer a batch. Where it is lost, the one that it was at hears so, and those behind that wait again."""
        left = deque(batch)
        try:
            async with aclosing(worker.answers([request.line for request in batch], self._timeout_s)) as answers:
                async for said in answers:
                    seconds, _, answer = said.partition(b" ")
                    self._slowest_s = max(float(seconds), FORGET * self._slowest_s)
                    _settle(left.popleft(), answer)
        except Lost as lost:
            if isinstance(lost, Late):
                self._slowest_s = self._timeout_s
            _settle(left.popleft(), lost)
            self._waiting.extendleft(reversed(left))
        except asyncio.CancelledError:  # closed
            for request in left:
                request.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - each caller is told
            for request in left:
                _settle(request, error)
        self._idle.append(worker)
        self._hand_out()


def _settle(request: _Request, answer: bytes | Exception) -> None:
    """Tell who asked, if it still waits."""
    if request.answer.done():
        return
    if isinstance(answer, Exception):
        request.answer.set_exception(answer)
    else:
        request.answer.set_result(answer)
