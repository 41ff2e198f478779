"""What a file of prompts or demonstrations is like as a whole: lengths, repetitions, rows that contradict one another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctpo_megatron.types import Prompt

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the rows of a file are, in tokens. A percentile is a length that occurs: so many of 100 rows are no longer."""

    least: int
    mean: float
    p50: int
    p90: int
    p99: int
    most: int
    total: int  # of all rows together

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Returns the summary of `lengths`, of which there is at least one."""
        sizes = np.asarray(lengths)
        p50, p90, p99 = (int(found) for found in np.percentile(sizes, PERCENTILES, method="inverted_cdf"))
        return cls(int(sizes.min()), float(sizes.mean()), p50, p90, p99, int(sizes.max()), int(sizes.sum()))


@dataclass(frozen=True, slots=True)
class Repeats:
    """Which conversations a file has several times. Rows are counted from 0."""

    different: int  # conversations, each counted once
    most: int  # times that the most frequent one occurs
    most_row: int  # where that one is first
    contradictions: tuple[tuple[int, int], ...]  # pairs of rows that ask the same and have different answers, one per question


def find_repeats(prompts: Sequence[Prompt]) -> Repeats:
    """Returns which of `prompts`, at least one, ask the same."""
    counts: dict[Hashable, int] = {}
    firsts: dict[Hashable, Prompt] = {}
    contradictions: dict[Hashable, tuple[int, int]] = {}
    for prompt, key in _keyed(prompts):
        counts[key] = counts.get(key, 0) + 1
        first = firsts.setdefault(key, prompt)
        if first.answer != prompt.answer:
            contradictions.setdefault(key, (first.index, prompt.index))
    often = max(counts, key=counts.__getitem__)
    return Repeats(len(counts), counts[often], firsts[often].index, tuple(contradictions.values()))


def find_shared(held_out: Sequence[Prompt], trained: Sequence[Prompt]) -> list[tuple[int, str]]:
    """Returns the rows of `held_out` that ask what one of `trained` asks, as pairs of the row and the first other's `key`."""
    known: dict[Hashable, str] = {}
    for prompt, key in _keyed(trained):
        known.setdefault(key, prompt.key)
    return [(prompt.index, known[key]) for prompt, key in _keyed(held_out) if key in known]


def _keyed(prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Hashable]]:
    """Yield each prompt with what tells its conversation from others. Prompts that share a conversation cost next to nothing."""
    keys: dict[int, Hashable] = {}
    for prompt in prompts:
        place = id(prompt.messages)
        if place not in keys:
            keys[place] = _frozen(prompt.messages)
        yield prompt, keys[place]


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _frozen(held)) for key, held in sorted(value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
