"""What n attempts at a problem say about k attempts at it, and how sure that is over problems: pure functions of counts.

Of every estimate that is made of k of n attempts, all C(n, k) choices are averaged exactly; nothing is drawn but the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 1_000  # resamples

Floats = NDArray[np.float64]


def ks(samples: int) -> list[int]:
    """Returns the k > 1 for which pass@k and maj@k are estimated from so many attempts: powers of two, and all of them."""
    powers = [1 << bit for bit in range(1, samples.bit_length()) if 1 << bit < samples]
    return powers + ([samples] if samples > 1 else [])


def pass_at(k: int, attempts: int, right: int) -> float:
    """Returns the chance that of k attempts at least one is right: 1 - C(n - c, k) / C(n, k).

    The estimator without bias of Chen et al., "Evaluating large language models trained on code" (arXiv 2107.03374), eq. 1.
    """
    return 1.0 - comb(attempts - right, k) / comb(attempts, k)


def maj_at(wanted: Sequence[int], right: int, wrong: Sequence[int], silent: int) -> list[float]:
    """Returns for each k of `wanted` the chance that the most frequent answer of k attempts is the right one.

    Of the attempts, `right` gave the right answer, `wrong` are the sizes of the classes of equal wrong answers, and `silent`
    gave none and do not vote. Among answers that are equally frequent one is drawn.
    """
    attempts, largest = right + sum(wrong) + silent, max(wanted)
    chances = dict.fromkeys(wanted, 0.0)
    for votes in range(1, right + 1):  # for the right answer
        ways = _ways_of_others(votes, wrong, silent, largest - 1)
        shares = 1.0 / np.arange(1, len(ways) + 1)  # of the right answer, when so many others have as many votes
        for k in chances:
            if votes <= k:
                chances[k] += comb(right, votes) * float(shares @ ways[:, k - votes])
    return [chances[k] / comb(attempts, k) for k in wanted]


def _ways_of_others(votes: int, wrong: Sequence[int], silent: int, most: int) -> Floats:
    """Returns in how many ways other attempts can be chosen such that no wrong answer has more than `votes`: [ties, chosen].

    `ties`: how many wrong answers have exactly `votes`. `chosen` goes up to `most`.
    """
    large = [size for size in wrong if size >= votes]
    free = silent + sum(size for size in wrong if size < votes)  # whose number does not matter
    ways = np.zeros((len(large) + 1, most + 1))
    ways[0] = [comb(free, chosen) for chosen in range(most + 1)]
    for size in large:
        before, ways = ways, np.zeros_like(ways)
        for of_it in range(min(votes, most) + 1):
            more = comb(size, of_it) * before[:, : most + 1 - of_it]
            if of_it == votes:
                ways[1:, of_it:] += more[:-1]
            else:
                ways[:, of_it:] += more
    return ways


def bootstrap(
    outcomes: Floats, *, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[Floats, Floats]:
    """Returns the ends of a percentile interval of the mean over problems, for each column of `outcomes` [problems, estimates].

    Problems are drawn again with replacement, with all their attempts: the interval is about other problems of the same kind.
    The same `seed` gives the same interval. Of a single problem nothing can be said, and both ends are its value.
    """
    problems = len(outcomes)
    rng = np.random.default_rng(seed)
    means = []
    for done in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - done)
        drawn = rng.integers(problems, size=(count, problems)) + problems * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * problems).reshape(count, problems)  # that each problem was drawn
        means.append(times @ outcomes / problems)
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
