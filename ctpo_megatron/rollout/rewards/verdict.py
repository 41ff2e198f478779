"""The score in a judge's reply."""

from __future__ import annotations

import json
import re

from ctpo_megatron.rollout.rewards.numbers import is_number, numbers_of

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
            if not is_number(score):
                raise Nonsense("its score is no number")
            return float(score), numbers_of(found)
    raise Nonsense("it has no JSON object with a score")
