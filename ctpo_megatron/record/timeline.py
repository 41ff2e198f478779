"""A stretch of time of which every part has exactly one owner."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from typing import Generic, TypeVar

T = TypeVar("T")


class Timeline(Generic[T]):
    """The time from `begin` to `end`, in whole milliseconds, all of it owned by `owner` at first.

    Painting changes owners and never the length: what the owners have adds up to `end - begin`.
    """

    def __init__(self, begin: int, end: int, owner: T) -> None:
        self.begin, self.end = begin, max(begin, end)
        self._starts, self._owners = [begin], [owner]  # a part reaches to the start of the next

    def paint(self, begin: int, end: int, owner: T) -> None:
        """Give the time from `begin` to `end` to `owner`, as far as it lies on the line."""
        begin, end = max(begin, self.begin), min(end, self.end)
        if begin >= end:
            return
        first, last = bisect_left(self._starts, begin), bisect_left(self._starts, end)
        starts, owners = [begin], [owner]
        if end < self.end and self._starts[last : last + 1] != [end]:
            starts.append(end)
            owners.append(self._owners[bisect_right(self._starts, end) - 1])
        self._starts[first:last], self._owners[first:last] = starts, owners

    def totals(self) -> dict[T, int]:
        """Returns the milliseconds of each owner that has any."""
        found: dict[T, int] = defaultdict(int)
        for start, end, owner in zip(self._starts, [*self._starts[1:], self.end], self._owners, strict=True):
            if end > start:
                found[owner] += end - start
        return dict(found)
