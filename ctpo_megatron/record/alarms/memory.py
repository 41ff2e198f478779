"""What alarms remember, as JSON values, so that a run that goes on does not have to read all of its rows again.

Detectors are objects of this package that hold numbers, series of numbers, and one another. All of that is written down, but for
functions and settings, which whoever reads it has already; an object that several share is written once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
Seen = set[int]


def remember(thing: Any, seen: Seen | None = None) -> Any:
    """Returns what `thing` remembers. Raises ValueError for a number that is not finite, which JSON has not."""
    seen = set() if seen is None else seen
    if isinstance(thing, dict):
        return {name: remember(each, seen) for name, each in thing.items()}
    if isinstance(thing, list | tuple | deque):
        return [remember(each, seen) for each in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        raise ValueError(f"{thing} cannot be kept")
    if not _is_ours(thing):
        return thing
    if id(thing) in seen:
        return None
    seen.add(id(thing))
    return {name: remember(value, seen) for name, value in _attributes(thing)}


def recall(thing: Any, kept: Any, seen: Seen | None = None) -> Any:
    """Returns `thing`, made with the same settings as what was `kept`, as that was; in place of numbers and series, those kept.

    Raises ValueError where the two are not of the same kind; `thing` is of no use then.
    """
    seen = set() if seen is None else seen
    if _is_ours(thing):
        if id(thing) not in seen:
            seen.add(id(thing))
            for (name, value), before in _pairs(dict(_attributes(thing)), kept):
                setattr(thing, name, recall(value, before, seen))
        return thing
    if isinstance(thing, dict) and _holds_ours(thing):
        return {name: recall(value, before, seen) for (name, value), before in _pairs(thing, kept)}
    if isinstance(thing, list | tuple) and _holds_ours(thing):
        if not isinstance(kept, list) or len(kept) != len(thing):
            raise ValueError(f"{len(thing)} are remembered here; found: {str(kept)[:200]}")
        return type(thing)(recall(each, before, seen) for each, before in zip(thing, kept, strict=True))
    return deque(kept, thing.maxlen) if isinstance(thing, deque) else kept


def _pairs(now: dict[str, Any], kept: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    if not isinstance(kept, dict) or set(kept) != set(now):
        raise ValueError(f"{sorted(now)} are remembered here; found: {str(kept)[:200]}")
    return ((each, kept[each[0]]) for each in now.items())


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields what an object of this package has of numbers, containers and objects of it."""
    for name, value in vars(thing).items():
        if value is None or isinstance(value, bool | int | float | str | dict | list | tuple | deque) or _is_ours(value):
            yield name, value


def _holds_ours(thing: Any) -> bool:
    """Whether an object of this package is in it, at any depth."""
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    return _is_ours(thing) or any(map(_holds_ours, parts))


def _is_ours(thing: Any) -> bool:
    """Whether it is an object of this package, and no function, class or method of it."""
    return type(thing).__module__.startswith(PACKAGE)
