"""A sampled turn up to the text that ends it, and its tokens as texts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import overload

from ctpo_megatron.types import Generation, Supports, TopK

Decode = Callable[[Sequence[int]], str]


def cut_at(made: Generation, stop: Sequence[str], decode: Decode, ends: Collection[int]) -> tuple[Generation, str]:
    """Returns what was sampled up to the first text of `stop`, and its text up to there, without a last token of `ends`.

    The tokens that make up that text are kept: they were sampled, and it depends on them alone that the turn ends there. What
    was sampled behind them is what nobody asked for.
    """
    ids = made.token_ids
    words = ids[:-1] if ids and ids[-1] in ends else ids
    text = decode(words)
    places = [place for each in stop if (place := text.find(each)) >= 0]
    if not places:
        return made, text
    count = 1 + bisect_left(range(1, len(words)), True, key=lambda n: any(each in decode(words[:n]) for each in stop))
    return _first(made, count), text[: min(places)]


def _first(made: Generation, count: int) -> Generation:
    """The first `count` tokens of a turn, as one that has ended there."""
    dropped = len(made.token_ids) - count
    experts, top, supports = made.routed_experts, made.top_k, made.supports
    if experts is not None and dropped:
        experts = experts[:-dropped]
    if supports is not None:
        supports = Supports(supports.ids[: int(supports.counts[:count].sum())], supports.counts[:count])
    return Generation(
        made.token_ids[:count],
        made.rollout_logp[:count],
        made.versions[:count],
        "stop",
        None if top is None else TopK(top.ids[:count], top.logp[:count]),
        experts,
        supports,
    )


class Texts(Sequence[str]):
    """Each token by itself, decoded when somebody looks."""

    def __init__(self, ids: Sequence[int], decode: Decode) -> None:
        self._ids, self._decode = ids, decode

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return Texts(self._ids[place], self._decode)
        return self._decode([self._ids[place]])
