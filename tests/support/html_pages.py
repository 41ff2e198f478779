"""Pages of HTML as their elements."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from ctpo_megatron.report.page import page


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the ids and links in it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(html)
    return parser.found


def leave_out_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages have a word in the place of the library that draws charts; tests/processes/report has the real one."""
    monkeypatch.setattr(page, "_library", lambda: "window.vegaEmbed = null;")
