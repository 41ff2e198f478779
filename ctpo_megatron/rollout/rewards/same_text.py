"""Whether answers are the same where no reward compares them: their text is."""

from __future__ import annotations


class SameText:
    """Compares answers by their words, without regard to white space."""

    async def same(self, one: str, other: str) -> bool | None:
        """Implement `Grader.same`."""
        return one.split() == other.split()
