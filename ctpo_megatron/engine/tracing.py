"""Requests to the servers as spans, for the time of a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ctpo_megatron.engine.http import Requests
from ctpo_megatron.record.spans import OpenSpan, Spans, replaced

TRACK = "requests to "  # and the server's address
GENERATE = "/generate"


def trace_requests(requests: Requests, spans: Spans) -> Callable[[], None]:
    """Let each request be a span on the track of its server, from its first try to its answer. Returns what ends that."""
    inner = requests.request

    async def spanned(method: str, url: str, *args: Any) -> Any:
        parts = urlsplit(url)
        with spans(parts.path, f"{TRACK}{parts.scheme}://{parts.netloc}") as opened:
            answer = await inner(method, url, *args)  # type: ignore[arg-type]
            if parts.path == GENERATE:
                _describe(opened, answer)
            return answer

    return replaced(requests, "request", spanned)


def _describe(opened: OpenSpan, answer: Any) -> None:
    """Add what SGLang says of a generation: counts of tokens, and its own times in seconds."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    for name, value in meta.items() if isinstance(meta, dict) else ():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            opened.details[name] = value if not isinstance(value, str) else value[:100]
