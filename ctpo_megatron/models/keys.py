"""Typed access to the values of a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ctpo_megatron.errors import ModelError, near_miss


class Keys:
    """Typed access to config.json whose errors name the file, the key, what was found and what is allowed."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of `key`; null counts as absent; an absent key without default is an error."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: key {key!r} is missing.{near_miss(key, self.values)}")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.where}: {key} is {value!r}, but must be of type {kind.__name__}.")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, int, default)
        if value < 1:
            raise ModelError(f"{self.where}: {key} is {value}, but must be at least 1.")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any other value, where the key is present at all."""
        if key in self.values and self.values[key] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise ModelError(f"{self.where}: {key} is {self.values[key]!r}; this package trains only models with {wanted}.")
