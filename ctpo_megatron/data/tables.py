"""Rows of a .parquet or .jsonl file, in batches, each row with the words that name its place for error messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.data.columns import check_parquet, content_in, refused
from ctpo_megatron.data.distinct import first_places, row_numbers
from ctpo_megatron.data.precision import as_written
from ctpo_megatron.errors import DataError, near_miss, storage_words
from ctpo_megatron.record.progress import reading_progress

SUFFIXES = (".parquet", ".jsonl")
BOM = "\ufeff"
SHOWN = 80  # characters of a wrong value that a message quotes
PARQUET_ROWS, JSON_ROWS = 1 << 17, 1 << 12  # of a batch


@dataclass(frozen=True, slots=True)
class Batch:
    """Some neighbouring rows of a file; those that say the same are there once. Rows are not to be changed."""

    places: tuple[str, int]  # what a row's number follows in its place, and the number of the first
    rows: list[dict[str, Any]]  # the distinct ones, each with the columns that were asked for
    firsts: NDArray[np.int64]  # [distinct] where in the batch each of them stands first
    numbers: NDArray[np.int64]  # [batch] which of them each row of the batch is

    def place(self, number: int) -> str:
        """Returns the place of row `number` of the batch: `train.parquet row 3`, or `train.jsonl line 4`."""
        words, first = self.places
        return f"{words} {first + number}"


class Table:
    """The rows of a file. Once it was read, `rows` counts them and `ignored` names the columns that were not asked for.

    `structs`: further columns, not read, that have to hold structs where they are there. `at_once`: most rows of a batch, fewer
    where each is much work: a progress bar moves with the batches.
    """

    def __init__(
        self, path: str | Path, columns: Sequence[str], structs: Sequence[str] = (), at_once: int = PARQUET_ROWS
    ) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        self.structs = tuple(structs)
        self._at_once = at_once
        self.rows = 0
        self.ignored: tuple[str, ...] = ()

    def batches(self) -> Generator[Batch]:
        """Yield all rows, none left out. A progress bar is shown where it takes long.

        Raises DataError where the file is missing, unreadable or empty, a row lacks one of the columns, or another column holds
        what the model would have to see.
        """
        _check_file(self.path)
        source = self._parquet if self.path.suffix == ".parquet" else self._json
        with reading_progress(f"reading {self.path.name}") as show:
            try:
                for batch in source(show):
                    self.rows += len(batch.numbers)
                    yield batch
            except OSError as error:
                raise DataError(f"{storage_words(error, self.path)}") from error
        if self.rows == 0:
            raise DataError(f"{self.path} holds no rows; at least one is needed")

    def _parquet(self, show: Callable[[int, int], None]) -> Iterator[Batch]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path, read_dictionary=self._texts()) as file:
                names = file.schema_arrow.names
                self._check_once(names)
                check_keys(str(self.path), dict.fromkeys(names), self.columns)
                self.ignored = tuple(name for name in names if name not in self.columns)
                self._check_structs(file.schema_arrow)
                check_parquet(self.path, file, self.columns)
                first = 0
                for batch in self._arrow_batches(file):
                    numbers = row_numbers([batch.column(name) for name in self.columns])
                    firsts = first_places(numbers)
                    rows = [_without_nulls(row) for row in as_written(batch.take(pa.array(firsts))).to_pylist()]
                    yield Batch((f"{self.path} row", first), rows, firsts, numbers)
                    first += len(numbers)
                    show(first, file.metadata.num_rows)
        except PermissionError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path} is not a readable parquet file (truncated, or another format?): {error}") from error

    def _arrow_batches(self, file: Any) -> Iterator[Any]:
        """Yield the columns asked for, row group by row group: each has a dictionary of its own, which Arrow does not join."""
        for group in range(file.num_row_groups):
            yield from file.iter_batches(batch_size=self._at_once, columns=list(self.columns), row_groups=[group])

    def _check_once(self, names: Sequence[str]) -> None:
        twice = [name for name in self.columns if names.count(name) > 1]
        if twice:
            found = f"{self.path} has {names.count(twice[0])} columns {twice[0]!r}"
            raise DataError(f"{found}; needed: one. Remove or rename the others.")

    def _texts(self) -> list[str]:
        """Returns the leaves of the columns that hold text: a batch has each text once, however often the file repeats it."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            leaves = [file.schema.column(number) for number in range(len(file.schema))]
        asked = [leaf for leaf in leaves if leaf.path.partition(".")[0] in self.columns]
        return [leaf.path for leaf in asked if leaf.logical_type.type == "STRING"]

    def _json(self, show: Callable[[int, int], None]) -> Iterator[Batch]:
        size, read, number = self.path.stat().st_size, 0, 0
        rows: list[dict[str, Any]] = []
        ignored: dict[str, None] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(_whole_lines(file), start=1):
                read += len(line)
                rows.append(self._json_row(f"{self.path} line {number}", line, ignored))
                if len(rows) == min(self._at_once, JSON_ROWS):
                    yield _all_distinct(f"{self.path} line", number - len(rows) + 1, rows)
                    rows = []
                    show(read, size)
        if rows:
            yield _all_distinct(f"{self.path} line", number - len(rows) + 1, rows)
        self.ignored = tuple(ignored)

    def _json_row(self, place: str, line: bytes, ignored: dict[str, None]) -> dict[str, Any]:
        """Returns the columns of the row in one line; adds the names of the others to `ignored`."""
        row = _parsed(place, line)
        check_keys(place, row, self.columns)
        for name, value in row.items():
            if name in self.columns:
                continue
            ignored.setdefault(name)
            if name in self.structs and not isinstance(value, dict | None):
                raise _no_struct(place, name, quote(value))
            if (kind := content_in(name, value)) is not None:
                raise refused(place, name, kind)
        return {name: row[name] for name in self.columns}

    def _check_structs(self, schema: Any) -> None:
        import pyarrow as pa

        for field in schema:
            if field.name in self.structs and not (pa.types.is_struct(field.type) or pa.types.is_null(field.type)):
                raise _no_struct(str(self.path), field.name, str(field.type))


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for every row of the file; `place` reads like `train.parquet row 3` or `train.jsonl line 4`.

    A row has the `columns` that are asked for. Raises DataError as `Table.batches` does.
    """
    for batch in Table(path, columns).batches():
        for number, distinct in enumerate(batch.numbers.tolist()):
            yield batch.place(number), batch.rows[distinct]


def check_keys(place: str, row: dict[str, Any], required: Sequence[str]) -> None:
    """Raise DataError where `row` lacks one of the `required` keys."""
    for name in required:
        if name not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            raise DataError(f"{place}: no {name!r}; found: {found}; required: {', '.join(required)}.{near_miss(name, row)}")


def quote(value: Any) -> str:
    """`value` as a short literal."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _check_file(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    try:
        if path.is_file():
            return
        found = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        state = "is not a file" if path.exists() else "does not exist"
    except OSError as error:
        raise DataError(storage_words(error, path)) from error
    raise DataError(f"{path} {state}; give a {' or '.join(SUFFIXES)} file.{'' if path.exists() else near_miss(path.name, found)}")


def _no_struct(place: str, name: str, found: str) -> DataError:
    return DataError(f"{place}: {name!r} is {found}; needed: a struct, or nothing")


def _all_distinct(words: str, first: int, rows: list[dict[str, Any]]) -> Batch:
    numbers = np.arange(len(rows))
    return Batch((words, first), rows, numbers, numbers)


def _whole_lines(file: Any) -> Iterator[bytes]:
    """Yield the lines of a file; blank ones at its end are not lines."""
    blank: list[bytes] = []
    for line in file:
        if line.strip():
            yield from blank
            blank = []
            yield line
        else:
            blank.append(line)


def _parsed(place: str, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not readable as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{place} is not JSON: it is blank; needed: one JSON object per line")
    if text[0] == BOM:
        raise DataError(f"{place} is not JSON: a byte order mark stands before it. Save the file as UTF-8 without one.")
    try:
        row = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} (character {error.pos + 1}); found {quote(text.rstrip())}"
        raise DataError(f"{place} is not JSON: {wrong}; needed: one JSON object per line") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds {quote(error.object[error.start])}, half of a character, which is no text") from error
    except _TwiceError as error:
        raise DataError(f"{place} gives the key {error.args[0]!r} twice in one object; needed: once") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}; found {quote(text.rstrip())}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is {quote(row)}; needed: one JSON object per line")
    return row


class _TwiceError(Exception):
    """A JSON object has a key more than once, of which Python's reader keeps the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row whose lists hold no null keys: Arrow gives every struct of a column all keys, absent ones as null."""
    return {name: _present(value) if isinstance(value, list) else value for name, value in row.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"role", "content"}:
            return value  # as nearly always
        return {key: _present(held) for key, held in value.items() if held is not None or key in ("role", "content")}
    return [_present(each) for each in value] if isinstance(value, list) else value
