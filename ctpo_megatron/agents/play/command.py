"""A program that plays one attempt and ends.

Its task is on stdin, as JSON, and in a file where the command names `{task}`; the endpoint's address and key are in its
environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path

from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.processes import Leashed, Sink
from ctpo_megatron.agents.play.runner import AgentFailed, Answer
from ctpo_megatron.agents.play.task import AgentTask, clean, variables
from ctpo_megatron.config.agents import CommandAgent
from ctpo_megatron.errors import ConfigError

MAX_ANSWER_BYTES = 1 << 16
TASK_FILE = "{task}"
SHOWN_CHARS = 500  # of stderr, in a message


class CommandRunner:
    """Starts `config.command` for each attempt (`AgentRunner`)."""

    def __init__(self, config: CommandAgent, logs: AgentLogs) -> None:
        self._config, self._logs = config, logs
        self.place = nullcontext()  # rollout.concurrency bounds them
        self._environment = clean(os.environ, config.pass_env) | config.env

    async def play(self, task: AgentTask) -> Answer:
        """Implement AgentRunner.play."""
        with ExitStack() as held:
            errors = Sink(self._config.log_kb << 10)
            held.callback(errors.close)
            answer = Sink(MAX_ANSWER_BYTES) if self._config.answer == "stdout" else errors
            held.callback(answer.close)
            own = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="agent-", ignore_cleanup_errors=True)))
            process = self._started(task, own, held, answer, errors)
            try:
                await process.ended()
            finally:
                code = process.kill()
                answer.close()
                errors.close()
                self._logs.write(task.attempt, errors.text)
            if code:
                raise AgentFailed(f"{task.attempt}: its agent {_ended_with(code)}{_last(errors.text)}")
            return Answer(answer.text if self._config.answer == "stdout" else None)

    async def close(self) -> None:
        """Implement AgentRunner.close: each program ends with its attempt."""

    def _started(self, task: AgentTask, own: Path, held: ExitStack, answer: Sink, errors: Sink) -> Leashed:
        text = task.to_json()
        stdin = held.enter_context(os.fdopen(os.memfd_create("task"), "w+b"))
        stdin.write(text.encode())
        stdin.seek(0)
        command = list(self._config.command)
        if any(TASK_FILE in word for word in command):
            file = own / "task.json"
            file.write_text(text, encoding="utf-8")
            command = [word.replace(TASK_FILE, str(file)) for word in command]
        directory = own / "work"
        directory.mkdir()
        try:
            process = Leashed(
                command,
                env=self._environment | variables(task),
                cwd=self._config.cwd or str(directory),
                stdin=stdin,
                stdout=answer.write,
                stderr=errors.write,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise AgentFailed(f"{task.attempt}: its agent cannot be started: {error}") from error
        errors.write.close()
        answer.write.close()
        return process


def check_command(config: CommandAgent) -> None:
    """Raise ConfigError where the program or its directory is not there."""
    program = config.command[0]
    if config.cwd is not None and not Path(config.cwd).is_dir():
        raise ConfigError(f"rollout.agent.cwd={config.cwd} is no directory; give one, or null for an empty one")
    path = (clean(os.environ, config.pass_env) | config.env).get("PATH")
    there = Path(config.cwd or "/", program)  # relative ones are looked for where it is started
    found = os.access(there, os.X_OK) and there.is_file() if "/" in program else shutil.which(program, path=path) is not None
    if not found:
        raise ConfigError(
            f"rollout.agent.command: there is no program {program!r} to execute; give a whole path, one relative to "
            "rollout.agent.cwd, or a name on PATH"
        )


def _ended_with(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _last(text: str) -> str:
    """The end of what it wrote, for a message."""
    said = text.strip()[-SHOWN_CHARS:]
    return f"; it wrote: {said}" if said else " and wrote nothing"
