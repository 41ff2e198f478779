"""A user's function that plays attempts, in processes that live on: a harness takes seconds to import.

Many attempts share a process. One whose function does not end when it is told to is ended with its process; the others there fail
with it and are made anew.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.processes import Leashed, Sink
from ctpo_megatron.agents.play.runner import AgentFailed, Answer
from ctpo_megatron.agents.play.task import AgentTask, clean
from ctpo_megatron.agents.play.worker import CHECK, MAX_LINE_BYTES
from ctpo_megatron.config.agents import FunctionAgent
from ctpo_megatron.errors import ConfigError

MODULE = "ctpo_megatron.agents.play.worker"
ROOT = Path(__file__).parents[3]  # from where an interpreter that does not have this package imports it
CANCEL_TIMEOUT_S = 5.0  # for a function to end when it is told to


class FunctionRunner:
    """Calls `config.path` for each attempt (`AgentRunner`), in the process that has the fewest."""

    def __init__(self, config: FunctionAgent, logs: AgentLogs) -> None:
        self._config = config
        self.place = asyncio.Semaphore(config.workers * config.per_worker)
        self._workers = [_Worker(config, logs, number) for number in range(config.workers)]
        self._logs = logs

    async def play(self, task: AgentTask) -> Answer:
        """Implement AgentRunner.play."""
        answer = await min(self._workers, key=lambda each: each.busy).play(task)
        if "error" in answer:
            self._logs.write(task.attempt, answer.get("trace", ""))
            raise AgentFailed(f"{task.attempt}: its agent failed: {answer['error']}")
        return Answer(answer["text"], answer["reward"])

    async def close(self) -> None:
        """Implement AgentRunner.close."""
        for worker in self._workers:
            worker.end("the run ends")


class _Worker:
    """One place for a process, which is started when it is first needed, and again after it had to be ended."""

    def __init__(self, config: FunctionAgent, logs: AgentLogs, number: int) -> None:
        self._config, self._logs, self._name = config, logs, f"worker-{number}"
        self._numbers = itertools.count()
        self._starting: asyncio.Task[_Process] | None = None
        self.busy = 0  # attempts that it has

    async def play(self, task: AgentTask) -> dict[str, Any]:
        """Returns the process's answer. Raises AgentFailed where the process ends meanwhile or does not start."""
        self.busy += 1
        try:
            process = await self._process()
            return await self._asked(process, next(self._numbers), task)
        finally:
            self.busy -= 1

    def end(self, why: str) -> None:
        """End the process, if there is one; what it has fails."""
        starting, self._starting = self._starting, None
        if starting is None:
            return
        if starting.done() and not starting.cancelled() and starting.exception() is None:
            starting.result().end(why)
        starting.cancel()

    async def _process(self) -> _Process:
        if self._starting is not None and self._starting.done() and not _alive(self._starting):
            self._starting = None
        if self._starting is None:
            self._starting = asyncio.create_task(_Process.started(self._config, self._logs, self._name))
        try:
            return await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise AgentFailed(f"{self._name}: its process was ended while it started") from None

    async def _asked(self, process: _Process, number: int, task: AgentTask) -> dict[str, Any]:
        answer = process.ask(number, task)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not answer.done():
                process.cancel(number)
                with suppress(TimeoutError, AgentFailed):
                    async with asyncio.timeout(CANCEL_TIMEOUT_S):
                        await asyncio.shield(answer)
                if not answer.done():
                    answer.cancel()
                    self.end(f"the function did not end at {task.attempt} when it was told to, and its process was ended for it")
            elif not answer.cancelled():
                answer.exception()  # nobody else looks at it
            raise


class _Process:
    """A process that takes tasks."""

    def __init__(self, config: FunctionAgent, logs: AgentLogs, name: str) -> None:
        self._logs, self._name = logs, name
        self._errors = Sink(config.log_kb << 10)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._lines = asyncio.StreamReader(MAX_LINE_BYTES)
        self._reading: asyncio.Task[None] | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self.ended = False
        their_in, our_in = os.pipe2(os.O_CLOEXEC)
        our_out, their_out = os.pipe2(os.O_CLOEXEC)
        self._in = _Writer(our_in)
        self._out = os.fdopen(our_out, "rb", buffering=0)
        try:
            self._process = Leashed(
                _command(config, str(config.per_worker)),
                env=_environment(config),
                cwd=None,
                stdin=their_in,
                stdout=their_out,
                stderr=self._errors.write,
            )
        except BaseException:
            self._in.close()
            self._out.close()
            self._errors.close()
            raise
        finally:
            os.close(their_in)
            os.close(their_out)
        self._errors.write.close()

    @classmethod
    async def started(cls, config: FunctionAgent, logs: AgentLogs, name: str) -> _Process:
        """Returns one that has imported the function. Raises AgentFailed where it does not in time."""
        process = cls(config, logs, name)
        said = b""
        try:
            protocol = asyncio.StreamReaderProtocol(process._lines)
            loop = asyncio.get_running_loop()
            process._in.send(_first(config))
            process._pipe, _ = await loop.connect_read_pipe(lambda: protocol, process._out)
            async with asyncio.timeout(config.start_timeout_s):
                said = await process._lines.readline()
            if not said or not json.loads(said).get("ready"):
                raise AgentFailed(f"rollout.agent.path={config.path}: its process does not start: {_words(said)}")
        except TimeoutError:
            process.end("it did not start in time")
            raise AgentFailed(
                f"rollout.agent.path={config.path} was not imported within rollout.agent.start_timeout_s="
                f"{config.start_timeout_s:g}"
            ) from None
        except BaseException:
            process.end("it did not start")
            raise
        process._reading = asyncio.create_task(process._read())
        return process

    def ask(self, number: int, task: AgentTask) -> asyncio.Future[dict[str, Any]]:
        """Returns where the answer to `task` is going to be."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._in.send({"number": number, "task": asdict(task)})
        return answer

    def cancel(self, number: int) -> None:
        """Tell the function of a task to end."""
        self._in.send({"number": number, "cancel": True})

    def end(self, why: str) -> None:
        """End it; tasks that it has fail with the words `why`. Safe to call twice."""
        if self.ended:
            return
        self.ended = True
        self._process.kill()
        self._in.close()
        if self._pipe is not None:
            self._pipe.close()
        self._out.close()
        self._errors.close()
        self._logs.write(self._name, self._errors.text)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(AgentFailed(f"{self._name}: {why}"))
                answer.exception()  # who waits for it hears it; who was cancelled need not
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()

    async def _read(self) -> None:
        while line := await self._lines.readline():
            said = json.loads(line)
            answer = self._answers.pop(said["number"], None)
            if answer is not None and not answer.done():
                answer.set_result(said)
        self.end("the process of its agent ended by itself")


class _Writer:
    """Writes lines into a pipe without waiting for its reader."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd, self._left = fd, bytearray()

    def send(self, said: dict[str, Any]) -> None:
        """Write a line, now or when there is room. Nothing where nobody reads any more."""
        if self._fd < 0:
            return
        waiting = bool(self._left)
        self._left += _line(said)
        if not waiting:
            self._write()
            if self._left:
                asyncio.get_running_loop().add_writer(self._fd, self._write)

    def close(self) -> None:
        """Write nothing more. Safe to call twice."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _write(self) -> None:
        try:
            del self._left[: os.write(self._fd, self._left)]
        except BlockingIOError:
            return
        except BrokenPipeError:  # its end is noticed elsewhere
            self._left.clear()
        if not self._left:
            asyncio.get_running_loop().remove_writer(self._fd)


def check_function(config: FunctionAgent) -> None:
    """Raise ConfigError where the function cannot be imported in a process of its own; its packages take seconds."""
    command, env, limit_s = _command(config, CHECK), _environment(config), config.start_timeout_s
    first = _line(_first(config))
    try:
        done = subprocess.run(command, env=env, input=first, capture_output=True, timeout=limit_s, check=False)
    except OSError as error:
        raise ConfigError(f"rollout.agent.python={config.python} cannot be started: {error}") from error
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"rollout.agent.path={config.path} was not imported within rollout.agent.start_timeout_s={limit_s:g}"
        ) from None
    said = done.stdout.partition(b"\n")[0]
    if not said or not json.loads(said).get("ready"):
        raise ConfigError(f"rollout.agent.path={config.path}: {_words(said)}. Is its package on PYTHONPATH?")


def _command(config: FunctionAgent, last: str) -> list[str]:
    return [config.python or sys.executable, "-m", MODULE, config.path, last]


def _first(config: FunctionAgent) -> dict[str, Any]:
    """What a process is told first; its arguments would be seen by all users of the machine."""
    return config.model_dump(mode="json", include={"options"})


def _line(said: dict[str, Any]) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _environment(config: FunctionAgent) -> dict[str, str]:
    env = clean(os.environ, config.pass_env) | config.env
    paths = [path for path in (env.get("PYTHONPATH"), str(ROOT)) if path]
    return env if config.python is None else env | {"PYTHONPATH": os.pathsep.join(paths)}


def _alive(starting: asyncio.Task[_Process]) -> bool:
    return not starting.cancelled() and starting.exception() is None and not starting.result().ended


def _words(said: bytes) -> str:
    return json.loads(said).get("error", "") if said else "its process ended while it was imported"
