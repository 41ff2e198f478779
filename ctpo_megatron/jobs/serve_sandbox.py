"""`ctpo serve-sandbox`: the confined Python of this host over HTTP, for runs whose `rollout.tool` is `remote`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rollout.sandbox import CASES, require_confinement, sandbox_available
from ctpo_megatron.rollout.sandbox.key import read_key
from ctpo_megatron.rollout.sandbox.service import Most, Service


async def serve(key_file: Path, host: str, port: int, most: Most, ended: asyncio.Event) -> None:
    """Serve until `ended`. Raises ConfigError where nothing could be confined here, or nothing can listen there."""
    key = read_key(key_file, "--key-file")
    reason = sandbox_available()
    if reason is not None:
        raise ConfigError(f"ctpo serve-sandbox: {reason}")
    require_confinement(PythonTool(memory_mb=most.memory_mb), "ctpo serve-sandbox")
    runner = Service(most, key).runner()
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"ctpo serve-sandbox: nothing can listen at {host}:{port}: {error.strerror or error}") from error
        taken = runner.addresses[0][1]
        print(
            f"sandbox at http://{host}:{taken}, for those who have the key: {most.at_a_time} programs at a time, "
            f"{most.timeout_s:g} s and {most.memory_mb} MiB each at most; it held against {', '.join(CASES)}",
            flush=True,
        )
        await ended.wait()
    finally:
        await runner.cleanup()
