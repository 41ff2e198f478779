"""The resumable seeded order in which training sees prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ctpo_megatron.errors import DataError
from ctpo_megatron.types import Prompt


class PromptSampler:
    """An endless stream of prompts: every epoch is a permutation drawn from (seed, epoch), so a position can be resumed.

    The same seed and prompts give the same stream, however it is cut into calls of `next` and across `restore`. A `restore` with
    another seed draws the rest of the epoch anew, so each prompt still comes once in every epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("no prompts to sample from; at least one is needed")
        self.prompts = list(prompts)
        self._fingerprint = fingerprint(self.prompts)
        self._start_epoch(0, seed)

    @classmethod
    def restore(cls, prompts: Sequence[Prompt], state: dict[str, Any], seed: int | None = None) -> PromptSampler:
        """Returns the sampler that `state()` described, which goes on with `seed`; None: with its own.

        Raises DataError where `prompts` are not the ones it was made with.
        """
        seeds = _seeds_of(state)
        sampler = cls(prompts, seeds[-1][1])
        if state["fingerprint"] != sampler._fingerprint:
            raise DataError(
                f"the prompts changed since the state was saved: {state['count']} rows then, {len(prompts)} now, with other "
                "contents. Resume with the same file, or start a new run."
            )
        position = state["position"]
        if seed is not None:
            seeds = _changed(seeds, position, seed)
        sampler._epoch, sampler._position, sampler._seeds = state["epoch"], position, seeds
        sampler._order = _order(len(prompts), state["epoch"], seeds)
        return sampler

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; epochs follow one another without a gap."""
        chosen: list[Prompt] = []
        while len(chosen) < count:
            if self._position == len(self.prompts):
                self._start_epoch(self._epoch + 1, self._seeds[-1][1])
            chosen.append(self.prompts[self._order[self._position]])
            self._position += 1
        return chosen

    def observe(self, results: Sequence[tuple[Prompt, float]]) -> None:
        """Look away: the order of prompts does not depend on what they earned."""

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values. `seeds`: [place in the epoch, seed of the order from there on]."""
        return {
            "seeds": [list(each) for each in self._seeds],
            "epoch": self._epoch,
            "position": self._position,
            "count": len(self.prompts),
            "fingerprint": self._fingerprint,
        }

    def _start_epoch(self, epoch: int, seed: int) -> None:
        self._epoch, self._position, self._seeds = epoch, 0, [(0, seed)]
        self._order = _order(len(self.prompts), epoch, self._seeds)


def last_seed(state: dict[str, Any]) -> int:
    """Returns the seed that the sampler of `state` went on with."""
    return _seeds_of(state)[-1][1]


def _seeds_of(state: dict[str, Any]) -> list[tuple[int, int]]:
    if "seeds" not in state:  # as releases wrote it that knew one seed
        return [(0, state["seed"])]
    return [(place, seed) for place, seed in state["seeds"]]


def _changed(seeds: list[tuple[int, int]], position: int, seed: int) -> list[tuple[int, int]]:
    """Returns `seeds` for an epoch that goes on with `seed` from `position` on; seeds that ordered no prompt leave no trace."""
    kept = [each for each in seeds if each[0] < position]
    return kept if kept and kept[-1][1] == seed else [*kept, (position, seed)]


def _order(count: int, epoch: int, seeds: list[tuple[int, int]]) -> np.ndarray:
    """Returns the places of `count` prompts in the order of an epoch, [count] int64."""
    order = np.arange(count)
    for place, seed in seeds:
        drawn = np.random.default_rng([seed, epoch, place] if place else [seed, epoch])
        order[place:] = drawn.permutation(np.sort(order[place:]))
    return order


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Returns what tells these prompts, in their order, from all others."""
    found = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        found.update(repr((prompt.index, prompt.messages, prompt.answer)).encode())
    return found.hexdigest()
