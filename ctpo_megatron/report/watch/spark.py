"""A series as one line of characters, each a stretch of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

LEVELS, ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


@dataclass(frozen=True, slots=True)
class Sparkline:
    """Means of `values`, in their order, over equal parts; as many parts as there is width, none with less than one value.

    The lowest mean is at the bottom and the highest at the top.
    """

    values: Sequence[float]
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        levels = ASCII_LEVELS if options.ascii_only else LEVELS
        text = "".join(levels[level] for level in heights(self.values, options.max_width, len(levels)))
        yield Segment(text, console.get_style(self.style))

    def __rich_measure__(self, _console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, options.max_width)


def heights(values: Sequence[float], width: int, levels: int) -> list[int]:
    """Returns for each of at most `width` parts of `values` the level of its mean, from 0 to `levels` - 1."""
    means = part_means(np.asarray(values, dtype=np.float64), width)
    if not len(means):
        return []
    low, high = float(means.min()), float(means.max())
    if high <= low:
        return [levels // 2] * len(means)
    return [min(levels - 1, int((each / 2 - low / 2) / (high / 2 - low / 2) * levels)) for each in means.tolist()]


def part_means(values: NDArray[np.float64], parts: int) -> NDArray[np.float64]:
    """Returns the means of `values` [n] over min(n, `parts`) parts that are equally long but for one value."""
    count = min(len(values), parts)
    if count <= 0:
        return np.empty(0)
    edges = np.arange(count + 1) * len(values) // count
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)
