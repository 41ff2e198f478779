"""The page put together: sections, charts, styles and scripts in one file."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from ctpo_megatron.report.figures.figure import theme
from ctpo_megatron.report.page.render import render
from ctpo_megatron.report.section import Section


def page(title: str, made: str, groups: Sequence[tuple[str, Sequence[Section]]], charts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the HTML of a report. `made`: when and by what; `groups`: sections under headings of the menu.

    `charts`: by the key of their place, in Vega-Lite's language. The page may load nothing from a network, and runs no script but
    those that are written here, whatever the text of a run says: its policy of content says so to the browser.
    """
    sections = [section for _, members in groups for section in members]
    nonce = secrets.token_urlsafe(16)
    return str(
        render(
            "page",
            title=title,
            made=made,
            groups=groups,
            nonce=nonce,
            styles=[
                Markup(_style(each)) for each in (_file("report.css"), *dict.fromkeys(s.styles for s in sections if s.styles))
            ],
            charts=embedded({"charts": charts, "themes": {"light": theme(dark=False), "dark": theme(dark=True)}}),
            library=Markup(_script(_library()) if charts else ""),
            scripts=[
                Markup(_script(each)) for each in (_file("report.js"), *dict.fromkeys(s.scripts for s in sections if s.scripts))
            ],
        )
    )


def embedded(value: Any) -> Markup:
    """Returns a value as JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _library() -> str:
    """Returns Vega, Vega-Lite and vega-embed as one script, which says `window.vegaEmbed`."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets a default
    return bundle


def _script(text: str) -> str:
    """Returns a script of ours so that it can stand inside a script element. In JavaScript the backslash changes nothing."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _style(text: str) -> str:
    """Returns a style of ours so that it can stand inside a style element."""
    return text.replace("</style", "<\\/style")


def _file(name: str) -> str:
    return resources.files("ctpo_megatron.report.page").joinpath(name).read_text(encoding="utf-8")
