"""How many examples of a property are tried: all of them or, for a glance (`make test-fast`), a part."""

from __future__ import annotations

from hypothesis import settings

ALL = 100  # hypothesis' own number of examples


def often(examples: int) -> int:
    """So many `examples`, or the share of them that the profile in use has of hypothesis' own number; one at least."""
    return max(1, round(examples * settings().max_examples / ALL))
