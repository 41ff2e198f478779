"""`ctpo serve-agents` without Ray and SGLang: an engine in their place says two lines.

    python -m tests.support.serving_agents RUN_DIR MODEL

imports once and forks a server for each line `start`, whose pid it says; for `wait` it says the exit code of the newest one.

While RUN_DIR/hold.N is there the engine stops within line N; RUN_DIR/sampling.N tells that it does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.jobs import endpoint, serve_agents
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Generation
from tests.support.agents import Hermes

LINES = ("I guess it is 3.", "No, it is \\boxed{2}.")
FIRST = 5  # tokens before it stops
SECOND_QUESTION = "sure"


class Holding:
    """Says the second line to who asks whether it is sure, and the first one to others."""

    def __init__(self, run_dir: Path, chat: ChatTokenizer) -> None:
        self._run_dir, self._chat = run_dir, chat

    async def generate(self, input_ids: list[int], done: Generation, **_options: Any) -> Generation:
        sure = SECOND_QUESTION in self._chat.decode(input_ids)
        ids = self._chat.assistant_ids(LINES[sure])
        if not done.token_ids:
            done.append(_part(ids, 0, FIRST))
        while (self._run_dir / f"hold.{int(sure)}").exists():
            (self._run_dir / f"sampling.{int(sure)}").touch()
            await asyncio.sleep(0.01)
        done.append(_part(ids, len(done.token_ids), len(ids)))
        done.finish = "stop"
        return done


def _part(ids: list[int], first: int, last: int) -> Generation:
    places = range(first, last)
    return Generation(ids[first:last], [-place / 64 for place in places], [1] * len(places))


class Standing:
    """In the place of a run's cluster."""

    def __init__(self, config: RunConfig, *_given: Any, **_more: Any) -> None:
        self.config = config

    async def __aenter__(self) -> Standing:
        return self

    async def __aexit__(self, *_error: object) -> None: ...

    async def guard(self, work: Coroutine[Any, Any, None]) -> None:
        await work


@asynccontextmanager
async def _client(runtime: Standing) -> AsyncIterator[Holding]:
    yield Holding(Path(runtime.config.run_dir), ChatTokenizer(Path(runtime.config.model.path)))


async def _serve(config: RunConfig) -> None:
    stop = StopSignal()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.tell, "SIGTERM")
    await serve_agents.serve_agents_job(config, stop)


def serve(run_dir: Path, model: Path) -> None:
    """What a process does from its beginning to SIGTERM; what it says is in RUN_DIR/log."""
    with (run_dir / "log").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    serve_agents.Runtime = Standing  # type: ignore[assignment,misc]
    serve_agents.open_client = _client  # type: ignore[assignment]
    endpoint.SGLangCallParser = lambda *_given, **_more: Hermes()  # type: ignore[assignment,misc,return-value]
    settings = {"name": "agents", "run_dir": str(run_dir), "model": {"path": str(model)}, "data": {"train": "none"}}
    external = {"tool": None, "agent": {"type": "external"}}
    asyncio.run(_serve(RunConfig.model_validate({**settings, "rollout": external, "cluster": {"device": "cpu"}})))


def main() -> None:
    run_dir, model = map(Path, sys.argv[1:])
    pid = 0
    for line in sys.stdin:
        if line.strip() == "start":
            pid = os.fork()
            if not pid:
                serve(run_dir, model)
                os._exit(0)
            print(pid, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
