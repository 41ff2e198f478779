"""Typed configuration: pydantic sections, unknown keys refused. `config.load` reads YAML files."""

from ctpo_megatron.config.run import RunConfig

__all__ = ["RunConfig"]
