"""Mixtures: prompts of several sources and pools, drawn by weights that a curriculum may change.

    draw n    a part by its weight, with random numbers of (seed, n); then that part's own next prompt
    observe   after a step: what its groups earned, for pools that are measured, and for the curriculum

A *part* is a source, `name`, or a pool of one, `name/0`, `name/1`, ... So the n-th prompt depends on the seed and on the steps
that were made when it was drawn, and on nothing else; a position can be resumed.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ctpo_megatron.config.feeding import MAIN
from ctpo_megatron.config.rollout import DataConfig
from ctpo_megatron.data.curriculum import Progress, asked, load_curriculum
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.data.pools import MeasuredPools
from ctpo_megatron.errors import DataError
from ctpo_megatron.types import Prompt

ALONE = "data.train alone"


class Sampler(Protocol):
    """An endless stream of prompts whose position can be kept."""

    def next(self, count: int) -> list[Prompt]:
        """Returns the next `count` prompts."""
        ...

    def observe(self, results: Sequence[tuple[Prompt, float]]) -> None:
        """Hear of a step: its prompts, and those that were filtered before it, with the mean rewards of their groups."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns all that is needed to go on, as JSON values; `seeds` and `count` as `PromptSampler` has them."""
        ...


def new_sampler(prompts: Sequence[Prompt], data: DataConfig, seed: int) -> Sampler:
    """Returns the sampler of a run that begins. Raises DataError where a source has no prompts."""
    return PromptSampler(prompts, seed) if _plain(data) else MixedSampler(prompts, data, seed)


def restored_sampler(prompts: Sequence[Prompt], data: DataConfig, seed: int, state: dict[str, Any]) -> Sampler:
    """Returns the sampler of a run that goes on from `state`. Raises DataError where prompts, sources or pools are others."""
    if not _plain(data):
        return MixedSampler(prompts, data, seed, state)
    if "parts" in state:
        raise DataError(f"the prompts were a mixture when the state was saved: {parts_in(state)}")
    return PromptSampler.restore(prompts, state, seed)


def parts_in(state: dict[str, Any]) -> list[str]:
    """Returns the names of the sources and pools that a sampler's state is about."""
    return sorted({*state.get("parts", {}), *state.get("measured", {})}) or [ALONE]


def _plain(data: DataConfig) -> bool:
    return not data.mixture and data.pools is None and data.curriculum is None


class MixedSampler:
    """The parts of a configuration, each with its own stream, and what they earned.

    `state`: of one that this one goes on from, with the present weights; None: it begins. Raises DataError where a source has no
    prompts, and where prompts, sources or pools are others than in `state`.
    """

    def __init__(self, prompts: Sequence[Prompt], data: DataConfig, seed: int, state: dict[str, Any] | None = None) -> None:
        self._data, self._seed, self._count = data, seed, len(prompts)
        self._streams: dict[str, PromptSampler] = {}
        self._measured: dict[str, MeasuredPools] = {}
        self._configured: dict[str, float] = {}
        for name, weight in ((MAIN, data.weight), *((each.name, each.weight) for each in data.mixture)):
            self._add_source(name, weight, [prompt for prompt in prompts if (prompt.source or MAIN) == name])
        self._curriculum = None if data.curriculum is None else load_curriculum(data.curriculum)
        self._drawn, self._steps = 0, 0
        self._earned = {name: [0.0, 0] for name in self._configured}  # sum of mean rewards, groups
        self._own: dict[str, Any] = {}  # the curriculum's
        self._weights = dict(self._configured)
        if state is None:
            self._ask()
        else:
            self._restore(state)

    def next(self, count: int) -> list[Prompt]:
        """Returns the next `count` prompts."""
        return [self._draw() for _ in range(count)]

    def observe(self, results: Sequence[tuple[Prompt, float]]) -> None:
        """Count what the groups of a step earned, and ask the curriculum. Raises ConfigError where that gives no weights."""
        for prompt, reward in results:
            earned = self._earned[self._part_of(prompt)]
            earned[0] += reward
            earned[1] += 1
            if (measured := self._measured.get(prompt.source or MAIN)) is not None:
                measured.observe(prompt, reward)
        self._steps += 1
        self._ask()

    def state(self) -> dict[str, Any]:
        """Returns all that `restore` needs, as JSON values."""
        return {
            "seeds": [[0, self._seed]],
            "count": self._count,
            "drawn": self._drawn,
            "steps": self._steps,
            "parts": {name: stream.state() for name, stream in self._streams.items()},
            "measured": {name: pools.state() for name, pools in self._measured.items()},
            "earned": {name: list(each) for name, each in self._earned.items()},
            "curriculum": self._own,
            "weights": dict(self._weights),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        parts, measured = state.get("parts", {}), state.get("measured", {})
        if (parts.keys(), measured.keys()) != (self._streams.keys(), self._measured.keys()):
            now = sorted({*self._streams, *self._measured})
            raise DataError(f"the sources and pools of the data changed since the state was saved: {parts_in(state)}, now {now}")
        self._streams = {
            name: PromptSampler.restore(stream.prompts, parts[name], self._seed) for name, stream in self._streams.items()
        }
        for name, of_source in self._measured.items():
            of_source.restore(measured[name])
        self._drawn, self._steps, self._own = state["drawn"], state["steps"], state["curriculum"]
        self._earned |= {name: list(each) for name, each in state["earned"].items() if name in self._earned}
        if self._curriculum is not None and state["weights"].keys() == self._configured.keys():
            self._weights = dict(state["weights"])

    def _add_source(self, name: str, weight: float, prompts: Sequence[Prompt]) -> None:
        pools = self._data.pools
        if not prompts:
            raise DataError(f"no prompts to sample from in the source {name!r}; at least one is needed")
        if pools is None:
            self._streams[name], self._configured[name] = PromptSampler(prompts, self._seed), weight
            return
        total = sum(pools.weights)
        self._configured |= {f"{name}/{pool}": weight * each / total for pool, each in enumerate(pools.weights)}
        if pools.column is None:
            self._measured[name] = MeasuredPools(prompts, pools.borders)
            return
        for pool in range(len(pools.weights)):
            members = [prompt for prompt in prompts if self._column_pool(prompt) == pool]
            if members:
                self._streams[f"{name}/{pool}"] = PromptSampler(members, self._seed)

    def _draw(self) -> Prompt:
        rng = np.random.default_rng([self._seed, self._drawn])
        self._drawn += 1
        there = {name: weight for name, weight in self._weights.items() if self._size(name)}
        if not sum(there.values()):  # all that has weight is empty now: what there is counts alike
            there = dict.fromkeys(there, 1.0)
        shares = np.array(list(there.values())) / sum(there.values())
        name = list(there)[int(rng.choice(len(there), p=shares))]
        if name in self._streams:
            (prompt,) = self._streams[name].next(1)
            return prompt
        source, _, pool = name.rpartition("/")
        return self._measured[source].draw(int(pool), rng)

    def _size(self, name: str) -> int:
        source, _, pool = name.rpartition("/")
        if source in self._measured:
            return self._measured[source].size(int(pool))
        return int(name in self._streams)

    def _part_of(self, prompt: Prompt) -> str:
        source = prompt.source or MAIN
        if self._data.pools is None:
            return source
        measured = self._measured.get(source)
        return f"{source}/{self._column_pool(prompt) if measured is None else measured.pool_of(prompt)}"

    def _column_pool(self, prompt: Prompt) -> int:
        assert self._data.pools is not None
        assert prompt.difficulty is not None, "it was read with its column"
        return bisect.bisect_right(self._data.pools.borders, prompt.difficulty)

    def _ask(self) -> None:
        if self._curriculum is None or self._data.curriculum is None:
            return
        rewards = {name: total / count if count else None for name, (total, count) in self._earned.items()}
        own = copy.deepcopy(self._own)  # a state that was given out does not change
        progress = Progress(self._steps, self._drawn, self._seed, dict(self._configured), rewards, own)
        self._weights, self._own = asked(self._curriculum, self._data.curriculum, progress)
