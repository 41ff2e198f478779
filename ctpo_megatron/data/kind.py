"""What a data file is for, told by its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from ctpo_megatron.data import prompts, sft

Kind = Literal["train", "sft"]  # the command that reads such a file


def kind_of(path: str | Path) -> Kind:
    """Returns "sft" for a file of demonstrations, otherwise "train". A file that cannot be read is left to its reader."""
    names = set(_column_names(Path(path)))
    return "sft" if names.issuperset(sft.COLUMNS) and not names.issuperset(prompts.COLUMNS) else "train"


def _column_names(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(path).names)
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        return list(row) if isinstance(row, dict) else []
    except (OSError, ValueError, RecursionError):  # Arrow's errors are among them
        return []
