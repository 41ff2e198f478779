"""Numbers that come with a reward and are recorded. Imports next to nothing: each process of a user's function begins with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MAX_NUMBERS = 20
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")  # what the record takes as the last part of a metric's name


def numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the first values of `found` that are finite numbers, true and false included, under names that the record takes."""
    good = {name: float(value) for name, value in found.items() if _NAME.fullmatch(name) and is_number(value)}
    return dict(list(good.items())[:MAX_NUMBERS])


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False
