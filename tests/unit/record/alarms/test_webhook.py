"""Alarms are posted in order and in the background; what cannot be sent is counted and told once, and nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from ctpo_megatron.config.alarms import WebhookConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms import webhook
from ctpo_megatron.record.alarms.webhook import TOO_MANY, Webhook, read_header
from ctpo_megatron.record.events import RunReady

RAISED = AlarmRaised("drift", "drift/mean", 7, 5, float("nan"), 0.05, "they part", "look", "tell")


class Hook:
    """A server that takes messages, or answers with the status that is next in `answers`; `arrived` once each is in."""

    def __init__(self) -> None:
        self.messages: list[dict] = []
        self.headers: list[str | None] = []
        self.answers: list[int] = []
        self.arrived: asyncio.Queue[None] = asyncio.Queue()
        self.opened = asyncio.Event()
        self.opened.set()

    async def take(self, request: web.Request) -> web.Response:
        await self.opened.wait()
        self.headers.append(request.headers.get("Authorization"))
        status = self.answers.pop(0) if self.answers else 200
        if status < 300:
            self.messages.append(await request.json())
        self.arrived.put_nowait(None)
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.take)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        finally:
            await runner.cleanup()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "FIRST_PAUSE_S", 0.0)


def test_alarms_and_their_ends_arrive_in_order_with_the_header() -> None:
    async def play() -> None:
        hook = Hook()
        async with hook.serving() as url:
            posting = Webhook(WebhookConfig(url=url), "mine", {"Authorization": "Bearer x"})
            async with posting.sending():
                posting(RAISED)
                posting(RunReady(1.0))
                posting(AlarmCleared("drift", "drift/mean", 9, 7, "well again"))
        raised, cleared = hook.messages
        assert (raised["event"], raised["alarm"], raised["step"], raised["value"]) == ("alarm raised", "drift", 7, "NaN")
        assert raised["text"].startswith("mine: ALARM drift at step 7")
        assert (cleared["event"], cleared["run"], cleared["raised"]) == ("alarm cleared", "mine", 7)
        assert hook.headers == ["Bearer x"] * 2
        assert posting.trouble() is None

    asyncio.run(play())


def test_what_fails_is_tried_again_and_a_redirect_is_not_followed() -> None:
    async def play() -> None:
        hook = Hook()
        hook.answers = [503, 500, 200, *[307] * 3]
        async with hook.serving() as url:
            posting = Webhook(WebhookConfig(url=url, retries=2), "mine", {})
            async with posting.sending():
                posting(RAISED)
                posting(RAISED)
        assert len(hook.messages) == 1
        assert len(hook.headers) == 6, "three tries of each, and none elsewhere"
        trouble = posting.trouble()
        assert trouble is not None
        assert (trouble.lost, trouble.reason) == (1, "the server answered 307")
        assert posting.trouble() is None, "told once"

    asyncio.run(play())


def test_nobody_waits_for_a_server_that_does_not_answer_and_what_waits_is_bounded() -> None:
    async def play() -> None:
        hook = Hook()
        hook.opened.clear()
        async with hook.serving() as url:
            posting = Webhook(WebhookConfig(url=url, waiting=3), "mine", {})
            async with posting.sending():
                for _ in range(10):
                    posting(RAISED)  # returns at once: nothing has been sent yet
                trouble = posting.trouble()
                assert trouble is not None
                assert (trouble.lost, trouble.reason) == (7, TOO_MANY)
                hook.opened.set()
            assert len(hook.messages) == 3

    asyncio.run(play())


def test_the_end_of_a_run_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "LAST_S", 0.0)

    async def play() -> None:
        hook = Hook()
        hook.opened.clear()
        async with hook.serving() as url:
            posting = Webhook(WebhookConfig(url=url), "mine", {})
            async with posting.sending():
                posting(RAISED)
            hook.opened.set()
        assert hook.messages == []

    asyncio.run(play())


def test_the_header_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "header"
    file.write_text("Authorization: Bearer secret\n")
    assert read_header(str(file)) == {"Authorization": "Bearer secret"}
    assert read_header(None) == {}
    for wrong in ("secret\n", "A: secret\nB: secret\n", "A: sec\x07ret", ": secret", ""):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="needed is one line") as caught:
            read_header(str(file))
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_header(str(tmp_path / "away"))


@pytest.mark.parametrize("url", ["https://name:word@host/x", "ftp://host", "host/x"])
def test_an_address_with_a_password_or_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="header_file"):
        WebhookConfig(url=url)
