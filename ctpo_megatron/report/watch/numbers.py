"""metrics.jsonl as it grows: what is shown of it over the steps, and sums."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec

SHOWN = (
    "reward/mean",
    "eval/accuracy",
    "sft/loss",
    "rollout/response_tokens",
    "train/entropy",
    "train/clip_fraction",
    "health/effective_sample_size",
    "drift/mean",
    "train/grad_norm",
    "rollout/staleness_mean",
    "rollout/staleness_max",
    "ledger/kept_length",
    "ledger/kept_reward",
    "time/step",
)
SUMMED = ("ledger/filtered", "ledger/failed", "ledger/aborted", "ledger/carried", "train/skipped_steps", "reward/undecided")
TRAINED = "time/step"  # stands in a step's own line, and not in that of an evaluation


def _field(name: str) -> str:
    return name.replace("/", "_")


# only these are taken out of a line of a hundred; "NaN" and "Infinity" stand as strings
_Line: Any = msgspec.defstruct(
    "_Line",
    [("step", int), ("time", float), *((_field(name), float | str | None, None) for name in (*SHOWN, *SUMMED))],
    rename={_field(name): name for name in (*SHOWN, *SUMMED)},
    gc=False,
)


@dataclass(slots=True)
class Series:
    """A number over the steps. `values`: finite ones; `broken`: how many were not. `low`, `high`: with their steps."""

    values: array[float] = field(default_factory=lambda: array("d"))
    broken: int = 0
    low: tuple[float, int] = (math.inf, 0)
    high: tuple[float, int] = (-math.inf, 0)

    @property
    def last(self) -> float | None:
        """Returns the newest value; None where there is none."""
        return self.values[-1] if self.values else None

    def add(self, step: int, value: float) -> None:
        """Add the value at `step`."""
        if math.isfinite(value):
            self.values.append(value)
            if value < self.low[0]:
                self.low = value, step
            if value > self.high[0]:
                self.high = value, step
        else:
            self.broken += 1


class Numbers:
    """What the lines say that were taken up with `take`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all: the file is another one now."""
        self.series: dict[str, Series] = {}
        self.sums: dict[str, float] = {}
        self.step = 0  # the newest
        self.trained = 0  # lines of training steps
        self.time: float | None = None  # of the newest line
        self.unreadable = 0

    def take(self, line: bytes) -> None:
        """Take up a line of the file; one that is no such line is counted as unreadable."""
        try:
            read = _DECODER.decode(line)
            found = {name: float(value) for name, key in _KEYS if (value := getattr(read, key)) is not None}
        except (msgspec.MsgspecError, ValueError):
            self.unreadable += 1
            return
        self.step, self.time = max(self.step, read.step), read.time
        self.trained += TRAINED in found
        for name, value in found.items():
            if name in _SUMMED:
                self.sums[name] = self.sums.get(name, 0.0) + (value if math.isfinite(value) else 0.0)
            else:
                self.series.setdefault(name, Series()).add(read.step, value)


_DECODER = msgspec.json.Decoder(_Line)
_KEYS = tuple((name, _field(name)) for name in (*SHOWN, *SUMMED))
_SUMMED = frozenset(SUMMED)
