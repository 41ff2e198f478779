"""How log-ratios were distributed at each position, as lines of RUN_DIR/ratios.jsonl: for the figures of CTPO's paper.

    {"step", "finest": [of S_t, of S_t / sqrt(t)], "reach", "tokens": {N: tokens}, "clipped": {N: tokens},
     "counts": [[{N: [BUCKETS]} for each sign of the advantage] for S_t, S_t / sqrt(t)]}

N is the first position of a range, which reaches to 2 N - 1. Ranges without a token are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctpo_megatron.algorithms.density import BUCKETS, FINEST, REACH, SIGNS
from ctpo_megatron.algorithms.health import POSITION_BINS
from ctpo_megatron.record.files import GrowingFile, Through, at_once, drop_steps
from ctpo_megatron.record.values import Sum, Value

NAME = "ratios.jsonl"


class RatioFile:
    """The file of a run, to which steps are added whose log-ratios were counted. Lines of `first_step` or later are dropped."""

    def __init__(self, run_dir: Path, first_step: int = 0, through: Through = at_once) -> None:
        drop_steps(run_dir / NAME, first_step)
        self._file = GrowingFile(run_dir / NAME, through)

    def write(self, step: int, stats: Mapping[str, Value]) -> None:
        """Add training step `step`, where something was counted. Raises StorageError."""
        line = ratio_line(step, stats)
        if line is not None:
            self._file.append_line(json.dumps(line))

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()


def ratio_line(step: int, stats: Mapping[str, Value]) -> dict[str, Any] | None:
    """Returns the line of a step with these statistics; None where they hold no counts."""
    density, tokens, clipped = (stats.get(f"health/{name}") for name in ("density", "tokens", "clipped"))
    if not (isinstance(density, Sum) and isinstance(tokens, Sum) and isinstance(clipped, Sum)):
        return None
    counts = np.asarray(density.total).reshape(2, SIGNS, POSITION_BINS, BUCKETS)
    ranges = [b for b in range(POSITION_BINS) if counts[0, :, b].any()]
    if not ranges:
        return None
    return {
        "step": step,
        "finest": list(FINEST),
        "reach": REACH,
        "tokens": {str(2**b): float(np.asarray(tokens.total)[b]) for b in ranges},
        "clipped": {str(2**b): float(np.asarray(clipped.total)[b]) for b in ranges},
        "counts": [
            [{str(2**b): each[b].astype(int).tolist() for b in ranges if each[b].any()} for each in kind] for kind in counts
        ],
    }
