"""The endpoint's server: listens, stops, and starts again at the same place."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Mapping
from typing import Any

from aiohttp import web

from ctpo_megatron.agents.http.exchange import Counts, Exchange, Manners
from ctpo_megatron.agents.http.keys import name_of
from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.protocols import Episodes
from ctpo_megatron.errors import InputError

BACKLOG = 2048  # connections that wait to be accepted, also while the server is started again
STOP_S = 5.0  # in which requests that are cancelled have to end


class AgentServer:
    """Serves `episodes` at `host` and `port`; 0: a free one. An async context manager, used in one event loop.

    The listening socket is kept from the first start to `close`: while the server is stopped, clients that connect wait, and are
    answered when it is started again. Requests in flight when it stops are cut off; their clients repeat them.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: str = "policy",
        limits: Limits | None = None,
        sampling: Mapping[str, Any] | None = None,
        overlooked: Collection[str] = (),
    ) -> None:
        self._host = host
        self._port = port
        self._limits = limits or Limits()
        self._exchange = Exchange(episodes, Manners(self._limits, dict(sampling or {}), frozenset(overlooked), model))
        self._socket: socket.socket | None = None
        self._listening: asyncio.Server | None = None
        self._connections: web.Server | None = None

    async def __aenter__(self) -> AgentServer:
        await self.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    @property
    def counts(self) -> Counts:
        """Returns what became of requests so far."""
        return self._exchange.counts

    @property
    def port(self) -> int:
        """Returns the port that is listened at."""
        return self._port

    def openai_url(self, key: str) -> str:
        """Returns the base URL for OpenAI's clients of the attempt with `key`. It tells no key."""
        return f"{self.anthropic_url(key)}/v1"

    def anthropic_url(self, key: str) -> str:
        """Returns the base URL for Anthropic's clients of the attempt with `key`. It tells no key."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/{name_of(key)}"

    async def start(self) -> None:
        """Listen. Raises InputError where the address cannot be listened at. Nothing where it listens already."""
        if self._connections is not None:
            return
        if self._socket is None:
            self._socket = _listening(self._host, self._port)
            self._port = self._socket.getsockname()[1]
        self._connections = web.Server(
            self._exchange,
            handler_cancellation=True,
            keepalive_timeout=self._limits.idle_s,
            access_log=None,
            logger=_unheard(),
            auto_decompress=False,
        )
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(self._connect, sock=self._socket.dup(), backlog=BACKLOG)

    async def stop(self) -> None:
        """Cut off all clients and accept no more. Those that connect wait for the next start. Nothing where it is stopped."""
        if self._connections is None or self._listening is None:
            return
        self._listening.close()
        for each in self._connections.connections:
            if each.transport is not None:
                each.transport.abort()
        await asyncio.sleep(0)  # the losses are told to the connections, which cancel their requests
        await self._connections.shutdown(STOP_S)
        self._connections = self._listening = None

    async def restart(self) -> None:
        """Stop and start again at the same address. No episode is lost: they are not the server's."""
        await self.stop()
        await self.start()

    async def close(self) -> None:
        """Stop and give the address back."""
        await self.stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> asyncio.Protocol:
        assert self._connections is not None
        return self._connections() if len(self._connections.connections) < self._limits.connections else _Full()


def _unheard() -> logging.Logger:
    """What aiohttp would log: heads of requests that are no HTTP, with the keys in them. Faults of ours `Exchange` logs."""
    made = logging.Logger("agents")
    made.addHandler(logging.NullHandler())
    return made


class _Full(asyncio.Protocol):
    """A connection beyond the bound: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise InputError(
            f"the agents' endpoint cannot listen at {host} port {port}: {(error.strerror or str(error)).lower()}. Choose another "
            "host or port; port 0 is any that is free"
        ) from None
    return made
