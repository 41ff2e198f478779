"""Where the parts of ranks are kept: away from these ranks, as far as the cluster allows."""

from __future__ import annotations

from collections.abc import Collection


def keeping_node(node: str, with_ranks: Collection[str], alive: Collection[str]) -> str:
    """Returns the node that keeps the parts of the ranks on `node`.

    A node without ranks of the trainer, in turn, where there is one: whichever node with ranks is lost, all parts are there
    still. Otherwise the next one of those with ranks, which is `node` itself where there is no other.
    """
    ranked = sorted(with_ranks)
    place = ranked.index(node)
    free = sorted(set(alive) - set(ranked))
    return free[place % len(free)] if free else ranked[(place + 1) % len(ranked)]
