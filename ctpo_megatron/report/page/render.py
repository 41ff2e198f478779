"""Templates to markup. What is filled in is escaped, whoever wrote it."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, **values: Any) -> Markup:
    """Returns the file `template`.html.j2 filled in with `values`."""
    return Markup(_templates().get_template(f"{template}.html.j2").render(**values))


@functools.cache
def _templates() -> Environment:
    loader = PackageLoader("ctpo_megatron.report.page")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": percent, "short": short, "span": span, "moment": moment, "code": code}
    return made


def code(text: str) -> Markup:
    """Returns a text in which what stands between backticks is marked as code; one without an end is a backtick."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(each) if at % 2 else escape(each) for at, each in enumerate(parts))


def percent(value: float | None, digits: int = 1) -> str:
    """Returns a share in per cent, a dash for None."""
    return "–" if value is None else f"{value:.{digits}%}"


def short(value: float | None) -> str:
    """Returns a number with four digits, a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def span(seconds: float | None) -> str:
    """Returns a length of time for a person: 3.2 s, 5 min 10 s, 2 h 3 min, 4 d 5 h."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for size, name, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / small), size // small)
            return f"{whole} {name} {rest} {smaller}"
    raise AssertionError("a minute is the smallest of these")


def moment(at: float | None) -> str:
    """Returns a time, seconds since 1970, as UTC; a dash for None and for times out of the calendar."""
    if at is None or not 0 <= at < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
