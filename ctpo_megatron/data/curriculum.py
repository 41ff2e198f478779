"""Weights by a user's function: which sources and pools training draws from, step by step."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ctpo_megatron.errors import ConfigError


@dataclass(slots=True)
class Progress:
    """What a curriculum knows: asked before the first step, and after each.

    `state` is its own: JSON values that it may change, which each checkpoint holds. What it says may depend on nothing but what
    is here, for a run that goes on to be the same run: random numbers come from `seed`, `step` and `state`.
    """

    step: int  # that are made
    drawn: int  # prompts so far
    seed: int
    weights: dict[str, float]  # as configured, by source, or source/pool
    rewards: dict[str, float | None]  # mean reward of the groups of each so far; None: there was none
    state: dict[str, Any] = field(default_factory=dict)


Curriculum = Callable[[Progress], Mapping[str, float]]


def load_curriculum(path: str) -> Curriculum:
    """Returns the function `package.module:function`. Raises ConfigError where there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.curriculum={path}: {error}. Is its package on PYTHONPATH?") from error
    if not callable(found):
        raise ConfigError(f"data.curriculum={path} is a {type(found).__name__}; needed: a function")
    return found


def check_curriculum(path: str | None) -> None:
    """Raise ConfigError where the function cannot be loaded; None: there is none."""
    if path is not None:
        load_curriculum(path)


def asked(curriculum: Curriculum, path: str, progress: Progress) -> dict[str, float]:
    """Returns the weights that a curriculum gives. Raises ConfigError where they, or its state, cannot be used."""
    known, given = progress.weights.keys(), dict(curriculum(progress))
    if given.keys() != known:
        raise ConfigError(f"data.curriculum={path} gave weights for {sorted(given)}; needed: for {sorted(known)}")
    bad = {name: weight for name, weight in given.items() if not math.isfinite(weight) or weight < 0}
    if bad or not sum(given.values()):
        raise ConfigError(f"data.curriculum={path} gave {bad or given}; weights are 0 or more, finite, and not all of them 0")
    try:
        json.dumps(progress.state)
    except TypeError as error:
        raise ConfigError(f"data.curriculum={path}: its state cannot be kept in a checkpoint: {error}") from error
    return {name: float(given[name]) for name in progress.weights}
