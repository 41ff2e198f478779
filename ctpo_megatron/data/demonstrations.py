"""Demonstrations of one or several files, in the resumable order in which training sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctpo_megatron.config.rollout import DataConfig
from ctpo_megatron.data.mixture import Sampler, new_sampler, restored_sampler
from ctpo_megatron.types import Prompt, TrainSample


class Demonstrations:
    """An endless stream of samples by `data.mixture`'s rules: sources by their weights, each in epochs of its own.

    `sources`: the samples of each, those of data.train under the empty name. `state`: of a stream that this one goes on from;
    None: it begins. Raises DataError for a source without samples, and where samples or sources are others than in `state`.
    """

    def __init__(
        self, sources: Mapping[str, Sequence[TrainSample]], data: DataConfig, seed: int, state: dict[str, Any] | None = None
    ) -> None:
        self._samples = [sample for samples in sources.values() for sample in samples]
        of = [name for name, samples in sources.items() for _ in samples]
        places = [Prompt(n, (), _content(each), source=of[n]) for n, each in enumerate(self._samples)]
        weights = data.model_copy(update={"pools": None, "curriculum": None})  # which look at rewards
        self._sampler: Sampler = (
            new_sampler(places, weights, seed) if state is None else restored_sampler(places, weights, seed, state)
        )

    def __len__(self) -> int:
        return len(self._samples)

    def next(self, count: int) -> list[TrainSample]:
        """Returns the next `count` samples."""
        return [self._samples[place.index] for place in self._sampler.next(count)]

    def state(self) -> dict[str, Any]:
        """Returns all that is needed to go on, as JSON values."""
        return self._sampler.state()


def _content(sample: TrainSample) -> str:
    found = hashlib.blake2b(np.array([*sample.input_ids[:1], *sample.labels], np.int64).tobytes(), digest_size=16)
    found.update(np.array(sample.mask, np.bool_).tobytes())
    return found.hexdigest()
