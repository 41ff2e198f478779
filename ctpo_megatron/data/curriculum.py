"""Weights by a user's function: which sources and pools training draws from, step by step."""

from __future__ import annotations

import importlib
import json
import math
import traceback
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

    step: int  # that were made, with those that a run left when it went back to before a spike
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
    except Exception as error:
        raise ConfigError(f"data.curriculum={path}: its module cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"data.curriculum={path} is a {type(found).__name__}; needed: a function")
    return found


def check_curriculum(path: str | None) -> None:
    """Raise ConfigError where the function cannot be loaded; None: there is none."""
    if path is not None:
        load_curriculum(path)


def asked(curriculum: Curriculum, path: str, progress: Progress) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the weights that a curriculum gives, and its state behind that, as it comes back from a checkpoint.

    Raises ConfigError where the function fails, or where its weights or its state cannot be used.
    """
    known = list(progress.weights)
    try:
        given: Any = curriculum(progress)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"data.curriculum={path} failed when {progress.step} steps were made: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from error
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"data.curriculum={path} gave a {type(given).__name__}; needed: a weight by the name of each of {known}"
        )
    if set(given) != set(known):
        raise ConfigError(f"data.curriculum={path} gave weights for {sorted(map(str, given))}; needed: for {sorted(known)}")
    bad = {name: given[name] for name in known if not _is_weight(given[name])}
    if bad or not 0 < sum(map(float, given.values())) < math.inf:
        raise ConfigError(
            f"data.curriculum={path} gave {bad or dict(given)}; weights are numbers from 0 on, finite, and not all of them 0"
        )
    return {name: float(given[name]) for name in known}, _kept(progress.state, path)


def _is_weight(value: Any) -> bool:
    try:
        return math.isfinite(value) and value >= 0
    except (TypeError, ValueError, OverflowError):
        return False


def _kept(state: Any, path: str) -> dict[str, Any]:
    """Returns `state` through JSON: a run that goes on and one that was never stopped see the same. Raises ConfigError."""
    try:
        kept = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"data.curriculum={path}: its state cannot be kept in a checkpoint: {error}") from error
    if not isinstance(kept, dict):
        raise ConfigError(f"data.curriculum={path}: its state is a {type(state).__name__}; needed: a dict of JSON values")
    return kept
