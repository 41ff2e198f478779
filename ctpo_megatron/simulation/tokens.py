"""Streams of tokens that are only counted: what the loop reads of a trajectory, without the memory and time of real tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any, cast

STOP = 1  # ends a turn of the model
WRITTEN = 0  # every other token


class Written(Sequence[Any]):
    """`count` tokens of the model, the last one STOP where it `ended` its turn. `text`: what they decode to."""

    __slots__ = ("_count", "_ended", "text")

    def __init__(self, count: int, *, ended: bool = False, text: str = "") -> None:
        self._count, self._ended, self.text = count, ended, text

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [WRITTEN] * len(range(self._count)[place])
        return STOP if self._ended and place in (-1, self._count - 1) else WRITTEN

    def __iter__(self) -> Iterator[int]:
        return repeat(WRITTEN, self._count)


class Spans(Sequence[int]):
    """A stream of few different numbers: (number, how often), in their order."""

    __slots__ = ("spans",)

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.spans = spans

    def __len__(self) -> int:
        return sum(count for _, count in self.spans)

    def __getitem__(self, place: Any) -> Any:
        return list(self)[place]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(repeat(value, count) for value, count in self.spans)


def as_list(stream: Sequence[Any]) -> list[Any]:
    """Returns `stream` under the type that a real one has; it is not copied."""
    return cast(list[Any], stream)
