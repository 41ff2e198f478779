"""Numbers, times and text of a run as they stand in a terminal."""

from __future__ import annotations

import time


def plain(text: str) -> str:
    """Returns text of a run with nothing in it that moves a terminal's cursor, colours it or turns its direction round."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def number(value: float | None) -> str:
    """Returns a number in at most nine characters; "-" for None."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Returns a stretch of time in its two largest units, like 3 d 4 h, 2 h 05 min, 41 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def clock(at: float, now: float) -> str:
    """Returns the time `at` in the viewer's zone: with its day where that is not the day of `now`."""
    same = time.localtime(at)[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M:%S" if same else "%d %b %H:%M", time.localtime(at))
