"""Reads YAML files and command-line overrides, and remembers where each value came from.

A file may name another one beside it with `extends: other.yaml`; its own keys go on top. A section whose `type` changes is
replaced as a whole, since the options of one type mean nothing to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctpo_megatron.config.base import expand_home
from ctpo_megatron.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Source:
    """Where values came from: a file or the command line, as a person would name it, and the keys found there."""

    name: str
    values: dict[str, Any]

    def holds(self, path: tuple[Any, ...]) -> bool:
        """Whether this source sets the value at `path`."""
        node: Any = self.values
        for key in path:
            in_list = isinstance(node, list) and isinstance(key, int) and key < len(node)
            if not in_list and not (isinstance(node, dict) and key in node):
                return False
            node = node[key]
        return True


def read_file(path: Path, above: tuple[Path, ...] = ()) -> list[Source]:
    """The sources of a file, the one it extends first. `above` are the files that led here. Raises ConfigError."""
    resolved = path.resolve()
    if resolved in above:
        raise ConfigError(f"{path}: `extends` runs in a circle: {' -> '.join(str(p.name) for p in (*above, resolved))}.")
    values = _mapping(path)
    parent = values.pop("extends", None)
    if parent is None:
        return [Source(str(path), values)]
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: found {parent!r}; it must be the name of one other config file.")
    base = path.parent / home_path(parent)
    if not base.is_file():
        raise ConfigError(f"{path}: extends: {str(base)!r} is not a file. The name is relative to {str(path.parent)!r}.")
    return [*read_file(base, (*above, resolved)), Source(str(path), values)]


def home_path(path: str | Path) -> Path:
    """`path` with the home directory in place of a leading `~`. Raises ConfigError for a user without one."""
    try:
        return Path(expand_home(str(path)))
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def read_overrides(overrides: list[str]) -> Source:
    """The overrides `dotted.key=value` as one source; values are read as YAML. Raises ConfigError."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{COMMAND_LINE}: {text!r} is not an override; write dotted.key=value, like train.steps=10.")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{COMMAND_LINE}: {text!r}: the value is not valid YAML ({_first_line(error)}).") from error
        values = merge(values, parsed)
    return Source(COMMAND_LINE, values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _types_differ(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def _types_differ(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return "type" in below and "type" in above and below["type"] != above["type"]


def resolve(values: dict[str, Any], name: str) -> dict[str, Any]:
    """`values` with every `${dotted.key}` replaced by what it points to. Raises ConfigError that names the file `name`."""
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = f"{name}: {key}" if key else name
        raise ConfigError(f"{where}: {_first_line(error)}. ${{a.b}} must name a key of this configuration.") from error
    return resolved


def _mapping(path: Path) -> dict[str, Any]:
    """The top level of one YAML file, not resolved."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; a config is a YAML file.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        known = f" {str(path.parent)!r} holds: {', '.join(beside)}." if beside else ""
        raise ConfigError(f"{path}: there is no such config file.{known}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}.") from error
    try:
        loaded = OmegaConf.create(text) if text.strip() else None
        values: Any = None if loaded is None else OmegaConf.to_container(loaded)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{position}: not valid YAML: {error.problem or error.context}.") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_first_line(error)}.") from error
    if not values:
        raise ConfigError(f"{path}: the file is empty; a config needs at least name, run_dir, model and data.")
    if not isinstance(values, dict) or _is_bare_word(text, values):
        raise ConfigError(f"{path}: the top level must be `key: value` lines, found {type(yaml.safe_load(text)).__name__}.")
    return values


def _is_bare_word(text: str, values: dict[str, Any]) -> bool:
    """OmegaConf reads a file holding one bare word as {word: None}."""
    return list(values.values()) == [None] and ":" not in text


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
