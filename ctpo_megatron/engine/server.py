"""One SGLang server as a child process: its start, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psutil

from ctpo_megatron.engine.http import Answer
from ctpo_megatron.engine.nursery import ForkedProcess
from ctpo_megatron.engine.processes import (
    CANNOT_LISTEN,
    adopt_orphans,
    end_group,
    group_shared_memory,
    names_of_group,
    reap_group,
    unlink_shared_memory,
)
from ctpo_megatron.engine.request_thread import RequestThread
from ctpo_megatron.errors import EngineError, StartLost

HEALTH_TIMEOUT_S = 10.0  # for one health check
POLL_S = 0.1
FORK_WITHIN_S = 120.0  # a nursery that is still importing; a server from nothing would take as long
SCHEDULER_KILLED = "scheduler died during initialization (exit code: -"  # as SGLang 0.5.23 says it, with the signal's number


def new_api_key() -> str:
    """A key for one run."""
    return secrets.token_urlsafe(32)


class SGLangServer:
    """Starts on construction. The process group ends with `stop()`, or when this process ends for whatever reason.

    `arguments` come from `server_args`; `env` is added to this process's environment; `log` receives all output.
    `nursery`: the socket of one (`engine.nursery`) that it is forked from, if that can be.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        url: str,
        api_key: str,
        log: Path,
        env: dict[str, str] | None = None,
        nursery: Path | None = None,
    ) -> None:
        self._nursery = nursery
        self.url = url
        self.log = log
        self._api_key = api_key
        self._segments: set[str] = set()
        self._schedulers: list[psutil.Process] = []
        adopt_orphans()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = self._begin(arguments, output, os.environ | (env or {}))
        with contextlib.suppress(BrokenPipeError):  # it has died already; wait_healthy tells with its exit code and log
            self._stdin.write(f"{api_key}\n".encode())
            self._stdin.flush()

    def _begin(self, arguments: list[str], output: IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes] | ForkedProcess:
        """Returns its main process, which leads a group of its own. Standard input is a pipe: it carries the key, then stays open
        as the sign that this process lives."""
        if self._nursery is not None:
            with contextlib.suppress(OSError):  # one that is gone, or that other variables were given to
                return ForkedProcess(self._nursery, arguments, output, env, FORK_WITHIN_S)
        return subprocess.Popen(
            [sys.executable, "-m", "ctpo_megatron.engine.sglang.entry", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )

    @property
    def pid(self) -> int:
        """Process id, which is also its process group."""
        return self._process.pid

    @property
    def _stdin(self) -> IO[bytes]:
        if self._process.stdin is None:  # it was asked for with subprocess.PIPE
            raise EngineError(f"the SGLang server {self.url} has no standard input")
        return self._process.stdin

    def wait_healthy(self, timeout_s: float, section: str = "rollout.engine") -> None:
        """Wait until the server answers a health check, which generates a token. `section`: whose `start_timeout_s` it has.

        Raises EngineError, with the end of the log, when the process ends first or `timeout_s` is over, StartLost when it or a
        scheduler was killed or its port was taken meanwhile; nothing is left then.
        """
        with contextlib.closing(RequestThread(self._api_key)) as requests:
            self._await_health(requests, timeout_s, section)
        self._segments = group_shared_memory(self.pid)
        self._schedulers = [psutil.Process(pid) for name, pid in names_of_group(self.pid) if name.startswith("scheduler")]

    def _await_health(self, requests: RequestThread, timeout_s: float, section: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not isinstance(requests.submit("GET", f"{self.url}/health", None, HEALTH_TIMEOUT_S).result(), Answer):
            if not self.alive():
                code, said = self.exit_code or 0, self.log_tail()
                self.stop()
                again = code < 0 or code == CANNOT_LISTEN or SCHEDULER_KILLED in said
                error = StartLost if again else EngineError
                raise error(f"SGLang server {self.url} ended with exit code {code} while starting.\n{said}")
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"SGLang server {self.url} was not ready after {timeout_s:.0f} s; "
                    f"raise {section}.start_timeout_s if it only needs longer.\n{self.log_tail()}"
                )
            time.sleep(POLL_S)

    def alive(self) -> bool:
        """Whether the server's main process runs, and once it is healthy its schedulers.

        It takes its children down with it; of the death of a scheduler it learns after seconds (SGLang 0.5.23).
        """
        return self._process.poll() is None and all(_runs(each) for each in self._schedulers)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the main process; negative: the signal that ended it; None: it runs."""
        return self._process.poll()

    @property
    def end(self) -> str:
        """Returns how it ended, in words: `ended with exit code 1`, or that it lost a scheduler."""
        return "has lost a scheduler" if self.exit_code is None else f"ended with exit code {self.exit_code}"

    def stop(self, grace_s: float = 0.0) -> None:
        """End all its processes and remove their shared memory. Safe to call again.

        `grace_s`: how long SGLang may take to end by itself (on GPUs it then gives memory back in order).
        Raises EngineError when a process survives SIGKILL.
        """
        if grace_s > 0 and self.alive():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        left = end_group(self.pid)
        unlink_shared_memory(self._segments)  # of those that had died before
        self._process.wait(10)
        reap_group(self.pid)
        self._stdin.close()
        if left:
            raise EngineError(f"processes {left} of the SGLang server {self.url} survived SIGKILL; its log: {self.log}")

    def log_tail(self, lines: int = 20) -> str:
        """The end of the log, with its path, for an error message."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"The last lines of {self.log}:", *(f"  {line}" for line in text[-lines:])])


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
