"""Alarms posted to a URL, in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from ctpo_megatron.config.alarms import WebhookConfig
from ctpo_megatron.errors import ConfigError, reason
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised, AlarmsUnsent
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.files import jsonable

FIRST_PAUSE_S = 1.0  # before the second try; each further pause is twice as long
LAST_S = 5.0  # at the end of a run, for what waits to be sent
TOO_MANY = "more of them came than could be sent"


class Webhook:
    """Posts alarms, and their ends, as JSON: call it with every event. `run`: the run's name, in every message.

    A message has the event's fields, `event`, `run`, and `text`, a sentence. Redirects are not followed, so that the header goes
    nowhere else. One message is sent at a time, in order; what waits beyond `waiting`, and what all tries failed for, is lost and
    counted. `header`: of every request. Belongs to one event loop.
    """

    def __init__(self, config: WebhookConfig, run: str, header: dict[str, str]) -> None:
        self._config, self._run, self._header = config, run, header
        self._waiting: deque[dict[str, Any]] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._lost, self._reason, self._told = 0, "", False

    def __call__(self, event: Event) -> None:
        """Have an alarm, or its end, sent; other events are none of its business. Returns at once."""
        if not isinstance(event, AlarmRaised | AlarmCleared):
            return
        if len(self._waiting) >= self._config.waiting:
            self._lose(TOO_MANY)
            return
        message = {"event": event.name, "run": self._run, "text": f"{self._run}: {event.sentence}", **asdict(event)}
        self._waiting.append(jsonable(message))
        self._idle.clear()
        self._wake.set()

    def trouble(self) -> AlarmsUnsent | None:
        """Returns what is to be told of messages that were lost, once until one is sent again."""
        if not self._reason or self._told:
            return None
        self._told = True
        return AlarmsUnsent(self._reason, self._lost)

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Send while the context is open; at its end, wait a moment for what is left."""
        sender = asyncio.create_task(self._send_on(), name="webhook")
        try:
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), LAST_S)
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_on(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._header) as session:
            while True:
                while self._waiting:
                    await self._send(session, self._waiting[0])
                    self._waiting.popleft()
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()

    async def _send(self, session: aiohttp.ClientSession, message: dict[str, Any]) -> None:
        failed = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                async with session.post(self._config.url, json=message, allow_redirects=False) as answer:
                    if answer.status < 300:
                        self._reason, self._told = "", False
                        return
                    failed = f"the server answered {answer.status}"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failed = f"{type(error).__name__}"  # its words may hold the URL, and a URL a secret
        self._lose(failed)

    def _lose(self, why: str) -> None:
        self._lost, self._reason = self._lost + 1, why


def read_header(path: str | None) -> dict[str, str]:
    """Returns the header in the file at `path`; none of None. Raises ConfigError, which does not show it, where there is none."""
    if path is None:
        return {}
    key = f"alarms.webhook.header_file={path}"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: it cannot be read: {reason(error)}") from error
    name, colon, value = lines[0].partition(":") if len(lines) == 1 else ("", "", "")
    if not (colon and name.strip() and value.strip()) or not (name + value).isprintable():
        raise ConfigError(f"{key}: needed is one line `Name: value`, such as `Authorization: Bearer ...`")
    return {name.strip(): value.strip()}
