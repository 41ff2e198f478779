"""Which of the trainer's parameters differ from those that the servers hold: each rank looks at its own pieces, where they lie.

It is done while the servers still sample, so a pause is as long as what has changed is large: nothing else is gathered, digested
or sent. What differs is found by the same digests that prove a publication (`engine.digest`), not by what an optimizer says that
it did.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ctpo_megatron.engine.digest import Part, tensor_digests
from ctpo_megatron.models.adapters import key_of
from ctpo_megatron.parallel.plain import all_gather_plain


class Tracked:
    """Remembers a digest, 8 bytes, of each of this rank's pieces as the servers hold it."""

    def __init__(self) -> None:
        self._held: dict[str, int] | None = None  # None: it is not known
        self._seen: dict[str, int] = {}

    def look(self, pieces: Mapping[str, Tensor]) -> set[str] | None:
        """The keys of the parameters that differ on any rank; None: all may, as some rank does not know. All ranks call it.

        An adapter's part differs as the parameter that it belongs to.
        """
        self._seen = dict(zip(pieces, tensor_digests(Part(piece) for piece in pieces.values()), strict=True))
        held = self._held
        mine = None if held is None else [key_of(part) for part, digest in self._seen.items() if held.get(part) != digest]
        differ: set[str] = set()
        known = True
        for each in all_gather_plain(mine, list[str] | None):
            known &= each is not None
            differ |= set(each or ())
        return differ if known else None

    def commit(self) -> None:
        """Note that what was looked at has arrived."""
        self._held = self._seen

    def forget(self) -> None:
        """What the servers hold is not known any more."""
        self._held = None
