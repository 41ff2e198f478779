"""An environment of one's own by its name in the configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ctpo_megatron.errors import ConfigError, near_miss
from ctpo_megatron.rollout.worlds.protocols import World, Worlds

KEY = "rollout.environment"
NEEDED = ("tools", "replayable", "reset", "step", "close")


def load_worlds(path: str, options: Mapping[str, Any]) -> Worlds:
    """Returns what makes a world for each attempt: `package.module:name`, given `options`. Raises ConfigError.

    A class is looked at; a function is not called before the first attempt.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{KEY}.path={path}: {error}. Is its package on PYTHONPATH?") from error
    except Exception as error:
        raise ConfigError(f"{KEY}.path={path}: its module cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{KEY}.path={path} is a {type(found).__name__}; needed: a class, or a function that returns a world")
    _check_options(found, path, options)
    if isinstance(found, type):
        _check_members(found, path)
    return partial(found, **options)


def static_tools(worlds: Worlds) -> Sequence[dict[str, Any]]:
    """The tools that all worlds of a class have; none where they are known only once there is a world."""
    made = worlds.func if isinstance(worlds, partial) else worlds
    tools = getattr(made, "tools", ())
    return tools if isinstance(tools, list | tuple) else ()


def check_world(world: World, path: str) -> None:
    """Raise ConfigError where an object lacks what a world has."""
    _check_members(world, path)


def _check_members(found: Any, path: str) -> None:
    missing = [name for name in NEEDED if not hasattr(found, name)]
    if missing:
        raise ConfigError(f"{KEY}.path={path} lacks {', '.join(missing)}; a world has {', '.join(NEEDED)} (docs/environments.md)")
    for name in ("reset", "step", "close"):
        if isinstance(found, type) and not inspect.iscoroutinefunction(getattr(found, name)):
            raise ConfigError(f"{KEY}.path={path}: {name} is no coroutine function; write `async def {name}`")


def _check_options(found: Any, path: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(found)
    except ValueError:  # of builtins
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        known = [name for name in signature.parameters if name != "self"]
        odd = next((name for name in options if name not in known), None)
        raise ConfigError(
            f"{KEY}.options: {path} takes ({', '.join(known)}): {error}.{'' if odd is None else near_miss(odd, known)}"
        ) from error
