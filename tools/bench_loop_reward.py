"""The reward of tools/bench_loop.py's runs, the same on both sides: half of all texts have it, so groups have advantages."""

from __future__ import annotations

from typing import Any


def reward(sample: dict[str, Any]) -> float:
    """1 for a text with an odd sum of bytes, else 0."""
    return score(sample["text"])


def score(text: str) -> float:
    """The same of a text."""
    return float(sum(text.encode()) % 2)
