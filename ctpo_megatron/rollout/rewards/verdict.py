"""The score in a judge's reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ctpo_megatron.config.rewards import CAPPED_NAME

MAX_NUMBERS = 20  # besides the score
_LINE = re.compile(r"(?:[A-Za-z][\w -]{0,40}[:=][\s*_]*)?([+-]?(?:\d+\.?\d*|\.\d+))")


class Nonsense(Exception):
    """A reply without a score. Its words say what is missing."""


def last_number(said: str) -> float:
    """Returns the number that the last line is, perhaps behind `Score:` or in bold. Raises Nonsense."""
    lines = said.strip().splitlines() or [""]
    found = _LINE.fullmatch(lines[-1].lstrip(" \t*_`$#>").rstrip(" \t*_`$."))
    if found is None:
        raise Nonsense("its last line is no number")
    return float(found[1])


def last_object(said: str) -> tuple[float, dict[str, float]]:
    """Returns `score` of the last JSON object that has one, and the other numbers in it. Raises Nonsense."""
    starts = [place for place, character in enumerate(said) if character == "{"][-50:]
    for start in reversed(starts):
        try:
            found, _ = json.JSONDecoder().raw_decode(said, start)
        except (ValueError, RecursionError):
            continue
        if "score" in found:
            score = found.pop("score")
            if not _is_number(score):
                raise Nonsense("its score is no number")
            return float(score), numbers_of(found)
    raise Nonsense("it has no JSON object with a score")


def numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the first values of `found` that are finite numbers, true and false included, under names that the record takes."""
    good = {name: float(value) for name, value in found.items() if re.match(CAPPED_NAME, name) and _is_number(value)}
    return dict(list(good.items())[:MAX_NUMBERS])


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False
