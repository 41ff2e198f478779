"""What the senders of all transports have in common."""

from __future__ import annotations

import time
from collections.abc import Callable

from ctpo_megatron.config.weights import Transport
from ctpo_megatron.engine.calls import ServerCalls
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.protocol import Server
from ctpo_megatron.weights.transports.delta import Changes
from ctpo_megatron.weights.transports.order import SenderOrder
from ctpo_megatron.weights.transports.prefetch import DigestAccount

PROBE_TIMEOUT_S = 10.0  # for a server to say what it is; one that does not is not worth a connection


class ConnectingSender:
    """The part of a `protocol.WeightSender` that reaches the servers; `config.timeout_s` bounds each of its calls.

    `order`: this sender's place among all, None for a single one. `new_account` makes the account of one publication's digests.
    """

    def __init__(
        self, config: Transport, order: SenderOrder | None = None, new_account: Callable[[], DigestAccount] | None = None
    ) -> None:
        self._timeout_s = config.timeout_s
        self._order = order or SenderOrder.alone()
        self._new_account = new_account
        self._changes = Changes(config.delta)
        self._connected: ServerCalls | None = None

    def connect(self, servers: list[Server], api_key: str) -> None:
        """Implement `WeightSender.connect`: `admit` the servers, look for them, and `join` them when the order says so."""
        deadline = time.monotonic() + self._timeout_s
        self.close()
        self.forget()
        with self._order.take(deadline):
            self.admit(servers)
            self._connected = ServerCalls(servers, api_key)
            self._connected.probe(min(PROBE_TIMEOUT_S, self._timeout_s)).finish(deadline)
            self.join(deadline)

    def admit(self, servers: list[Server]) -> None:
        """Raise WeightSyncError for servers that this transport cannot reach."""

    def join(self, deadline: float) -> None:
        """Set up what the transport needs with the servers, all of which answer."""

    def forget(self) -> None:
        """Make the next publication a full one."""
        self._changes.forget()

    def close(self) -> None:
        """Implement `WeightSender.close`."""
        if self._connected is not None:
            self._connected.close()
            self._connected = None

    @property
    def _calls(self) -> ServerCalls:
        """The servers. Raises WeightSyncError where none is connected."""
        if self._connected is None:
            raise WeightSyncError("no inference server is connected: call connect() before send(), and again after a failure")
        return self._connected
