"""Puts a new policy version in front of the rollouts: pause, send, prove, resume."""

from __future__ import annotations

import time
from typing import Protocol

from ctpo_megatron.errors import WeightSyncError


class Servers(Protocol):
    """What the publisher asks of the inference servers; `rollout.client.EngineClient` offers it."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def versions(self) -> list[str]: ...


class WeightSource(Protocol):
    """What it asks of the trainer."""

    async def publish(self, version: int) -> None:
        """All ranks export, one sends; ends, within a bounded time, when every server has loaded."""


class Publisher:
    """Brings the trainer's weights to the inference servers."""

    def __init__(self, servers: Servers, trainer: WeightSource) -> None:
        self._servers = servers
        self._trainer = trainer

    async def publish(self, version: int) -> float:
        """Generations in flight go on under the new version from their next token. Returns the seconds it took.

        Raises WeightSyncError when a server does not report `version` afterwards. After any failure the servers stay paused:
        nobody samples from weights of which nobody knows what they are.
        """
        begin = time.monotonic()
        await self._servers.pause()
        await self._trainer.publish(version)
        reported = await self._servers.versions()
        if any(each != str(version) for each in reported):
            raise WeightSyncError(f"after publishing version {version} the inference servers report the versions {reported}")
        await self._servers.resume()
        return time.monotonic() - begin
