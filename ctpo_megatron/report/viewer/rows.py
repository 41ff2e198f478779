"""Lines of RUN_DIR/rollouts as a run wrote them, one after the other: no file is ever in memory as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ctpo_megatron.errors import storing

Number = float | str  # a number that is not finite is the text that `float` reads


class TurnRow(msgspec.Struct, gc=False):
    """A turn, its streams as JSON that nobody has read yet: most turns are only counted."""

    role: str
    token_ids: msgspec.Raw
    rollout_logp: msgspec.Raw
    versions: list[int]


class BranchRow(msgspec.Struct, gc=False):
    """What else was sampled in an attempt."""

    prompt_ids: msgspec.Raw
    turns: list[TurnRow]


class Row(msgspec.Struct, gc=False):
    """A trajectory. Fields that a release did not write yet have values that say nothing."""

    id: str
    prompt_ids: msgspec.Raw
    turns: list[TurnRow]
    status: str = ""
    text: str = ""
    answer: str = ""
    given: str | None = None
    reward: Number = 0.0
    tool_calls: int = 0
    tool_errors: int = 0
    seconds: Number = 0.0
    undecided: bool = False
    why: str = ""
    terms: dict[str, Any] = {}
    prompt_index: int = -1
    group: str = ""
    branches: list[BranchRow] = []


@dataclass(frozen=True, slots=True)
class RolloutFile:
    """A file of rows. `kind`: step, eval or agents; `step`: training steps by then, None where none is in its name."""

    path: Path
    kind: str
    step: int | None

    @property
    def name(self) -> str:
        """Returns what it is called, without its ending."""
        return self.path.stem


@dataclass(frozen=True, slots=True)
class Line:
    """Where a row stands in its file."""

    begin: int
    size: int


_NAME = re.compile(r"(step|eval)_(\d+)")
_decoder = msgspec.json.Decoder(Row)
ints = msgspec.json.Decoder(list[int])
numbers = msgspec.json.Decoder(list[Number])


def rollout_files(run_dir: Path) -> list[RolloutFile]:
    """Returns the files of a run that have rows: training steps first, in their order; what has another name is none."""
    found = []
    for path in sorted((run_dir / "rollouts").glob("*.jsonl")):
        named = _NAME.fullmatch(path.stem)
        if named is not None:
            found.append(RolloutFile(path, named[1], int(named[2])))
        elif path.stem == "agents":
            found.append(RolloutFile(path, "agents", None))
    return sorted(found, key=lambda each: (("step", "eval", "agents").index(each.kind), each.step or 0))


def read_rows(file: RolloutFile) -> Iterator[tuple[Line, Row | None]]:
    """Yields the rows of a file with their places; None for a line that is no row, such as one that is being written."""
    with storing(file.path), file.path.open("rb", buffering=1 << 20) as opened:
        begin = 0
        for line in opened:
            yield Line(begin, len(line)), _parse(line)
            begin += len(line)


def read_at(file: RolloutFile, lines: list[Line]) -> Iterator[Row]:
    """Yields the rows at places that `read_rows` named. Raises StorageError where the file has changed since."""
    with storing(file.path), file.path.open("rb") as opened:
        for line in lines:
            opened.seek(line.begin)
            row = _parse(opened.read(line.size))
            if row is None:
                raise OSError("it changed while it was read")
            yield row


def count(numbers_in: msgspec.Raw) -> int:
    """Returns how many numbers a JSON list of them holds, without reading one."""
    text = bytes(numbers_in)
    return text.count(b",") + 1 if len(text) > 2 and text[1:-1].strip() else 0


def _parse(line: bytes) -> Row | None:
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
