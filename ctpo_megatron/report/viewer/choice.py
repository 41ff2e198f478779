"""Whose tokens are kept where a run has more of them than the page is to hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

from ctpo_megatron.report.viewer.summaries import Summary

Rank = Callable[[Summary], float]
_LAST = float("inf")

RANKS: dict[str, Rank] = {  # the smallest come first
    "worst": lambda each: float(each.reward),
    "best": lambda each: -float(each.reward),
    "longest": lambda each: -each.sampled,
    "most clipped": lambda each: _LAST if each.clipped is None else -each.clipped,
    "most drifted": lambda each: _LAST if each.gap is None else -each.gap,
    "at random": lambda each: crc32(each.id.encode()),  # the same whenever it is asked
}


def chosen(trajectories: Sequence[Summary], most_tokens: int) -> list[int]:
    """Returns the places, ascending, of trajectories with at most `most_tokens` tokens: of each rank the first, then the next.

    At least the first of each rank is there, however long it is.
    """
    orders = [_order(list(map(rank, trajectories))) for rank in RANKS.values()]
    kept: dict[int, None] = {}
    tokens = 0
    for depth, row in enumerate(zip(*orders, strict=True)):
        for place in row:
            size = trajectories[place].tokens
            if place not in kept and (depth == 0 or tokens + size <= most_tokens):
                kept[place] = None
                tokens += size
        if depth and tokens >= most_tokens:
            break
    return sorted(kept)


def _order(keys: list[float]) -> list[int]:
    """Returns the places of the smallest of `keys`, the next, and so on; equal ones in their order."""
    return sorted(range(len(keys)), key=keys.__getitem__)
