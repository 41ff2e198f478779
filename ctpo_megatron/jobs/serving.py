"""Commands that serve until a signal ends them: what `ctpo --help` says of them, and their exit codes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from ctpo_megatron.config.sources import home_path
from ctpo_megatron.config.tools import PythonTool


def serve_sandbox(
    key_file: Annotated[Path, typer.Option(help="file with the key that is asked for", show_default=False, callback=home_path)],
    host: Annotated[str, typer.Option(help="address to listen at; programs and the key travel as plain text")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8300,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="most wall time that a program may ask for")] = 60.0,
    memory_mb: Annotated[int, typer.Option(min=32, help="most memory that a program may ask for")] = 2048,
    concurrency: Annotated[int | None, typer.Option(min=1, help="programs at a time; default: eight for each CPU")] = None,
) -> None:
    """Run programs for runs elsewhere (rollout.tool.type=remote), each confined as rollout.tool.type=python does it; until a
    signal."""
    from ctpo_megatron.jobs.serve_sandbox import serve
    from ctpo_megatron.rollout.sandbox.service import Most

    most = Most(timeout_s, memory_mb, PythonTool(concurrency=concurrency).at_a_time)
    raise typer.Exit(_until_signal(lambda ended: serve(key_file, host, port, most, ended)))


def _until_signal(serve: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Serve; returns the exit code that belongs to the signal which ended it."""
    received: list[int] = []

    async def served() -> None:
        ended = asyncio.Event()

        def hear(number: int) -> None:
            received.append(number)
            ended.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, hear, number)
        await serve(ended)

    asyncio.run(served())
    return 128 + received[0]
