"""Typed access to the values of a config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ctpo_megatron.errors import ModelError, near_miss


class Keys:
    """Typed access to config.json whose errors name the file, the key, what was found and what is allowed.

    `defaults`: what an absent key stands for, by transformers' class of the family. `nulls`: what null stands for where that
    class allows it; any other null of a key that the class has is an error, as SGLang could not read the file either.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        nulls: Mapping[str, Any] | None = None,
    ) -> None:
        self.values, self.where = values, where
        self._defaults, self._nulls = defaults or {}, nulls or {}

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of `key`; an absent key without a default, the class's or else this one, is an error."""
        value = self.values.get(key)
        if value is None:
            value = self._without_value(key, default)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.where}: {key} is {value!r}, but must be of type {kind.__name__}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{self.where}: {key} is {value!r}, but must be a finite number.")
        return value

    def _without_value(self, key: str, default: Any) -> Any:
        if key not in self.values:
            found = self._defaults.get(key, default)
            if found is None:
                raise ModelError(f"{self.where}: key {key!r} is missing.{near_miss(key, self.values)}")
            return found
        if key in self._nulls:
            return default if self._nulls[key] is None else self._nulls[key]
        if key in self._defaults or default is None:
            raise ModelError(f"{self.where}: {key} is null, which transformers and SGLang do not read; give a value.")
        return default

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value: int = self.get(key, int, default)
        if value < 1:
            raise ModelError(f"{self.where}: {key} is {value}, but must be at least 1.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that may be 0."""
        value: int = self.get(key, int, default)
        if value < 0:
            raise ModelError(f"{self.where}: {key} is {value}, but must be at least 0.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value: float = self.get(key, float, default)
        if value <= 0.0:
            raise ModelError(f"{self.where}: {key} is {value}, but must be more than 0.")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any other value, where the key is present at all."""
        if key in self.values and self.values[key] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise ModelError(f"{self.where}: {key} is {self.values[key]!r}; this package trains only models with {wanted}.")
