"""Pools of prompts whose difficulty is measured while training: a prompt moves to another pool when it earns more or less."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from ctpo_megatron.data.order import fingerprint
from ctpo_megatron.errors import DataError
from ctpo_megatron.types import Prompt


class MeasuredPools:
    """The prompts of one source by the mean reward of their groups so far. Pool 0 holds those that were not tried.

    In a pool the prompts come first that were drawn least often, in a random order.
    """

    def __init__(self, prompts: Sequence[Prompt], borders: Sequence[float]) -> None:
        self._prompts, self._borders = list(prompts), list(borders)
        self._places = {prompt.key: place for place, prompt in enumerate(self._prompts)}
        self._drawn = np.zeros(len(self._prompts), np.int64)
        self._sums, self._counts = np.zeros(len(self._prompts)), np.zeros(len(self._prompts), np.int64)
        self._pools = np.zeros(len(self._prompts), np.int64)

    def size(self, pool: int) -> int:
        """Returns how many prompts are in a pool now."""
        return int(np.count_nonzero(self._pools == pool))

    def draw(self, pool: int, rng: np.random.Generator) -> Prompt:
        """Returns a prompt of `pool`, which is not empty."""
        members = np.flatnonzero(self._pools == pool)
        rarest = members[self._drawn[members] == self._drawn[members].min()]
        place = int(rarest[rng.integers(len(rarest))])
        self._drawn[place] += 1
        return self._prompts[place]

    def observe(self, prompt: Prompt, reward: float) -> None:
        """Count the mean reward of a group."""
        place = self._places[prompt.key]
        self._sums[place] += reward
        self._counts[place] += 1
        self._pools[place] = self._pool(place)

    def pool_of(self, prompt: Prompt) -> int:
        """Returns the pool that a prompt is in now."""
        return int(self._pools[self._places[prompt.key]])

    def state(self) -> dict[str, Any]:
        """Returns all that `restore` needs, as JSON values: of the prompts that were drawn, how often, and what they earned."""
        drawn = np.flatnonzero(self._drawn)
        columns = (drawn, self._drawn[drawn], self._sums[drawn], self._counts[drawn])
        return {"fingerprint": fingerprint(self._prompts), "drawn": [column.tolist() for column in columns]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Raises DataError where the prompts are others."""
        if state.get("fingerprint") != fingerprint(self._prompts):
            raise DataError("the prompts changed since the state was saved")
        places, drawn, sums, counts = state["drawn"]
        self._drawn[places], self._sums[places], self._counts[places] = drawn, sums, counts
        for place in places:
            self._pools[place] = self._pool(place)

    def _pool(self, place: int) -> int:
        count = self._counts[place]
        return 0 if count == 0 else 1 + bisect.bisect_right(self._borders, self._sums[place] / count)
