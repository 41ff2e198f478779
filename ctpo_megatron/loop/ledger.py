"""Every group and attempt from its admission to its end: RUN_DIR/ledger.jsonl, and the sums of it.

A line for each group that ended, written when the step is made before which, or in which, it did:

    {"step", "group", "prompt", "version", "end", "reason", "reward", "tokens", "attempts": [{"status", "reward", ...}]}

`step` counts from 1; `version` is that of its admission, `reward` and `tokens` are means over its attempts. The file only grows:
a run that goes back to a checkpoint writes {"back": STEP}, and of the lines before it those of later steps count no more. What is
open is in memory, and in each checkpoint (`RunState.open`). At any time: admitted = ended + open.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import StorageError, storing
from ctpo_megatron.loop.admission import Admitted, Position
from ctpo_megatron.loop.buffer import MadeStep
from ctpo_megatron.loop.tally import Tally, group_line
from ctpo_megatron.record.files import GrowingFile, Through, at_once, drop_half_line, jsonable
from ctpo_megatron.types import End, GroupId

NAME = "ledger.jsonl"
GONE = "its prompt is not among the prompts any more"
LEFT = "the run left its course, and went back to before it"
OVER = "the run is done"


class Ledger:
    """The account of a run that goes on at `position`, behind `step` training steps. Belongs to one event loop.

    `path`: its file; None: it is kept in memory alone. `gone`: groups that were open and cannot go on. `passed_over`: the groups
    that the lines of later steps tell of are not admitted again, they are aborted. `through`: how lines are written.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        step: int = 0,
        position: Position | None = None,
        gone: Iterable[int] = (),
        passed_over: bool = False,
        through: Through = at_once,
    ) -> None:
        position = position or Position(0, {})
        self._open = {group.id.number: group for group in position.open}
        self._file: GrowingFile | None = None
        self._tally, later = Tally(), list[str]()
        if path is not None:
            drop_half_line(path)
            self._tally, later = read_tally(path, step)
            self._file = GrowingFile(path, through)
        if later:
            self._write({"back": step})
        lost = dict.fromkeys((str(GroupId(number)) for number in gone), GONE)
        lost |= dict.fromkeys(later if passed_over else (), LEFT)
        for group, reason in lost.items():  # of the next step: a run that goes back to this one again has them open again
            known = dict.fromkeys(("prompt", "version", "reward", "tokens"))
            self._add({"step": step + 1, "group": group, **known, "end": End.ABORTED, "reason": reason, "attempts": []})
        self._admitted = position.groups
        self._unknown = position.groups - self._tally.groups - len(self._open)  # of a release without a ledger

    @property
    def open(self) -> tuple[Admitted, ...]:
        """Returns the groups that are open, in the order of their numbers."""
        return tuple(self._open.values())

    def admit(self, group: Admitted) -> None:
        """Enter a group that was admitted. Raises ValueError where its number is not the next one."""
        if group.id.number != self._admitted:
            raise ValueError(f"{group.id} was admitted, but {GroupId(self._admitted)} is the next one")
        self._admitted += 1
        self._open[group.id.number] = group

    def settle(self, step: int, made: MadeStep) -> dict[str, float]:
        """Enter the ends of all groups that a step is made of, and of those that ended before it; `step` counts from 1.

        Returns the step's metrics. Raises ValueError for a group that is not open, StorageError where the disk does not take
        them.
        """
        ends = Counter(each.end for each in made.ended)
        for group in made.groups:
            self._add(group_line(self._close(group.id.number), step, End.TRAINED, "", group))
        for each in made.ended:
            self._add(group_line(self._close(each.number), step, each.end, each.reason, each.made))
        counts = {f"ledger/{end}": float(ends[end]) for end in (End.FILTERED, End.FAILED, End.ABORTED)}
        return counts | self._tally.bias()

    def end_all(self, step: int, reason: str = OVER) -> None:
        """Enter the end of all groups that are open behind the last step, `step`: nothing of them is used any more.

        It belongs to the next step, which would have had them: a run that goes on from this one with more steps takes it back.
        Raises StorageError.
        """
        for number in list(self._open):
            self._add(group_line(self._close(number), step + 1, End.ABORTED, reason, None))

    def unbalanced(self) -> list[str]:
        """Returns a sentence for all that does not balance: nothing where each admitted group is open or has ended once."""
        found, ended = [], self._tally.groups + self._unknown
        if self._admitted != ended + len(self._open):
            found.append(f"{self._admitted} groups were admitted, but {ended} have ended and {len(self._open)} are open")
        if self._unknown < 0:
            found.append(f"{-self._unknown} more groups have ended, or are open, than the checkpoint had admitted")
        if self._unknown > 0:
            found.append(
                f"{self._unknown} groups that the checkpoint had admitted are not in the ledger: a release without one began the "
                "run, or lines are lost"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Returns the sums for summary.json: how many groups ended how, and which, by length and by difficulty."""
        counts = {"admitted": self._admitted, "open": len(self._open), "unknown": self._unknown}
        return {**counts, "unbalanced": self.unbalanced(), **self._tally.summary()}

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()

    def _close(self, number: int) -> Admitted:
        if number not in self._open:
            raise ValueError(f"{GroupId(number)} ended, but it is not open: it was not admitted, or has ended before")
        return self._open.pop(number)

    def _add(self, line: dict[str, Any]) -> None:
        self._tally.add(line)
        self._write(line)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.append_line(json.dumps(jsonable(line), allow_nan=False))


def read_tally(path: Path, step: int | None = None) -> tuple[Tally, list[str]]:
    """Returns the sums of a ledger's lines up to `step`, None: all that count, and the groups of the later ones."""
    steps: dict[int, Tally] = {}
    groups: dict[int, list[str]] = {}
    for line in _lines(path):
        if "back" in line:
            for later in [each for each in steps if each > line["back"]]:
                del steps[later], groups[later]
            continue
        steps.setdefault(line["step"], Tally()).add(line)
        groups.setdefault(line["step"], []).append(line["group"])
    last = max(steps, default=0) if step is None else step
    whole = Tally()
    for each, tally in steps.items():
        if each <= last:
            whole.update(tally)
    return whole, [group for each in sorted(groups) if each > last for group in groups[each]]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with storing(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):  # of a run that is writing it
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise StorageError(
                    f"{path} line {number} is damaged: {error}. Take the line out; its group is unknown then"
                ) from error
