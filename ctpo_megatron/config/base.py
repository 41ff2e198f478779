"""The base of every config section: frozen, unknown keys refused, documented by the docstring under each field."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def expand_home(path: str) -> str:
    """`path` with the home directory in place of a `~` or `~user` that it begins with. Raises ValueError for an unknown user."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{path!r}: no home directory is known for {path.partition('/')[0]!r}; write the whole path")
    return expanded


FilePath = Annotated[str, AfterValidator(expand_home)]  # the path of a file or directory


class Section(BaseModel):
    """One part of the configuration. Immutable once built, so it can be passed anywhere without being changed there."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
