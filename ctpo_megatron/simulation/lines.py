"""Files of a run that hold an object of JSON in each line; the run may be writing them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ConfigError


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects in `path`, none where there is no such file; a last line that is half written is left out.

    Raises ConfigError, which names the line, for any other that is damaged.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found = json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    return
                raise ConfigError(f"{path} line {number} is damaged: {error}. Give another run, or take the line out.") from error
            yield found
