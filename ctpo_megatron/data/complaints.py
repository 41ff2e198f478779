"""What is wrong with the rows of a file, gathered so that a person hears of all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctpo_megatron.errors import DataError

SHOWN = 5  # rows that a message names


class Complaints:
    """The rows of one file that cannot be used: how many there are, and what is wrong with the first ones."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._first: list[str] = []
        self._rows = 0

    def add(self, words: str, rows: int = 1) -> None:
        """Note what is wrong with `rows` rows that say the same; `words` names the first one."""
        self._rows += rows
        if len(self._first) < SHOWN:
            self._first.append(words)

    def settle(self, rows: int) -> None:
        """Raise DataError where something was noted about the file, which has `rows` rows."""
        if self._rows == 0:
            return
        if self._rows == 1:
            raise DataError(self._first[0])
        lines = [f"{self._rows:,} of {rows:,} rows of {self._path} cannot be used; the first of them:", *self._first]
        raise DataError("\n- ".join(lines))


def listed(items: Sequence[str]) -> str:
    """Returns the first items of a list, and how many more there are."""
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
