"""Rows of a .parquet or .jsonl file, each with the words that name its place for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import DataError, near_miss

SUFFIXES = (".parquet", ".jsonl")
SHOWN = 80  # characters of a wrong value that a message quotes


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for every row of the file; `place` reads like `train.parquet row 3` or `train.jsonl line 4`.

    Raises DataError where the file is missing, unreadable, empty, or a row lacks one of `columns`. No row is left out.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if not path.is_file():
        found = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        state = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; give a {' or '.join(SUFFIXES)} file.{near_miss(path.name, found)}")
    count = 0
    for place, row in _parquet_rows(path, columns) if path.suffix == ".parquet" else _json_rows(path):
        check_keys(place, row, columns)
        yield place, row
        count += 1
    if count == 0:
        raise DataError(f"{path} holds no rows; at least one is needed")


def check_keys(place: str, row: dict[str, Any], required: Sequence[str]) -> None:
    """Raise DataError where `row` lacks one of the `required` keys."""
    for name in required:
        if name not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            raise DataError(f"{place}: no {name!r}; found: {found}; required: {', '.join(required)}.{near_miss(name, row)}")


def check_messages(place: str, column: str, messages: Any, roles: Sequence[str]) -> tuple[dict[str, str], ...]:
    """`messages` as a tuple of {role, content}. Raises DataError where it is anything but a list of those in these `roles`."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {column!r} is {quote(messages)}; needed: a list of {{role, content}} with at least one entry")
    for number, message in enumerate(messages):
        where = f"{place}: {column}[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{where} is {quote(message)}; needed: {{role, content}}")
        check_keys(where, message, ("role", "content"))
        if message["role"] not in roles:
            raise DataError(f"{where} has role {quote(message['role'])}; allowed: {', '.join(roles)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise DataError(f"{where} has content {quote(message['content'])}; needed: text that is not blank")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def quote(value: Any) -> str:
    """`value` as a short literal."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_keys(str(path), dict.fromkeys(file.schema_arrow.names), columns)
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file (truncated, or another format?): {error}") from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not readable as UTF-8 text: {error}") from error
    if lines == [""]:
        return
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}; found {quote(line)}") from error
        if not isinstance(row, dict):
            raise DataError(f"{place} is {quote(row)}; needed: one JSON object per line")
        yield place, row
