"""From a YAML file and command-line overrides to a checked RunConfig, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.explain import explain, sections_in, type_name
from ctpo_megatron.config.run import RunConfig
from ctpo_megatron.config.sources import home_path, merge, read_file, read_overrides, resolve
from ctpo_megatron.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration in the YAML file at `path`, with `overrides` (`dotted.key=value`) on top.

    A `~` at the beginning of a path is the home directory; otherwise paths stay as given. Raises ConfigError whose message
    holds one line per mistake: where it was written, the dotted key, what was found and what is allowed.
    """
    sources = [*read_file(home_path(path)), read_overrides(overrides or [])]
    merged: dict[str, Any] = {}
    for source in sources:
        merged = merge(merged, source.values)
    values = with_default_types(resolve(merged, str(path)), RunConfig)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, sources, str(path))) from error


def with_default_types(values: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """`values` where a section without `type` has that of its default, so one option can be changed without naming it."""
    filled = dict(values)
    for name, field in section.model_fields.items():
        value = filled.get(name)
        options = sections_in(field.annotation)
        if not isinstance(value, dict) or not options:
            continue
        if len(options) > 1 and isinstance(field.default, Section):
            value = {"type": type_name(type(field.default)), **value}
        chosen = [option for option in options if len(options) == 1 or type_name(option) == value.get("type")]
        filled[name] = with_default_types(value, chosen[0]) if chosen else value
    return filled


def dump_config(config: RunConfig) -> str:
    """`config` as YAML with every default written out; `load_config` reads it back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
