"""Work that is shared out among threads, one of them the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise


def in_threads(take: Callable[[int, int], None], shares: Sequence[tuple[int, int]]) -> None:
    """Call `take` with each share (first, last): the first one in this thread, the others beside it."""
    if len(shares) > 1:
        with ThreadPoolExecutor(len(shares) - 1) as pool:
            others = [pool.submit(take, *share) for share in shares[1:]]
            take(*shares[0])
            for other in others:
                other.result()
    else:
        for share in shares:
            take(*share)


def equal_shares(count: int, threads: int) -> list[tuple[int, int]]:
    """Runs (first, last) of `count` things for at most as many threads; none is empty."""
    cuts = [count * thread // threads for thread in range(threads + 1)]
    return [(first, last) for first, last in pairwise(cuts) if first < last]
