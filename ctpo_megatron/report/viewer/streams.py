"""A trajectory's tokens as arrays, and the numbers by which trajectories are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.record.token_files import NOT_TRAINED, TokenRecord
from ctpo_megatron.report.viewer.rows import Row, TurnRow, count, ints, numbers

AUTHORS = ("prompt", "policy", "tool")
POLICY = AUTHORS.index("policy")


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a trajectory's own tokens. None: the run recorded nothing of training."""

    clipped: float | None  # share
    gap: float | None  # mean |log-prob difference| of trainer and engine
    ratio: float | None  # the largest |log-ratio|


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one author; `branch` 0 is what the attempt ended with, 1 and more are its branches."""

    author: int
    tokens: int
    branch: int


@dataclass(frozen=True, slots=True)
class Streams:
    """All tokens of a trajectory, its branches behind it; `logp` and `versions` of those that the policy wrote."""

    segments: list[Segment]
    ids: NDArray[np.uint32]
    logp: NDArray[np.float32]
    versions: NDArray[np.int32]


def parts_of(row: Row) -> Iterator[tuple[msgspec.Raw, list[TurnRow]]]:
    """Yields prompt and turns of the samples that training made of a row: the trajectory, then its branches."""
    yield row.prompt_ids, row.turns
    for branch in row.branches:
        yield branch.prompt_ids, branch.turns


def sampled(row: Row) -> list[int]:
    """Returns how many tokens the policy wrote, sample by sample."""
    return [sum(len(turn.versions) for turn in turns if turn.role == "assistant") for _, turns in parts_of(row)]


def total(row: Row) -> int:
    """Returns the tokens of a row, of prompts and tools too."""
    return sum(count(prompt) + sum(len(turn.versions) for turn in turns) for prompt, turns in parts_of(row))


def versions_of(row: Row) -> tuple[int, int]:
    """Returns the oldest and the newest version that wrote a token; -1 where none did."""
    found = [turn.versions for _, turns in parts_of(row) for turn in turns if turn.role == "assistant" and turn.versions]
    return (min(map(min, found)), max(map(max, found))) if found else (-1, -1)


def spread(record: TokenRecord | None) -> Spread:
    """Returns what training made of a trajectory's tokens, in numbers. Tokens that were not trained on do not count."""
    if record is None:
        return Spread(None, None, None)
    trained = record.fate != NOT_TRAINED
    fate, gap, ratio = record.fate[trained], record.gap.astype(np.float32), record.log_ratio[trained].astype(np.float32)
    gap = gap[np.isfinite(gap)]
    return Spread(
        float((fate > 0).mean()) if fate.size else None,
        float(np.abs(gap).mean()) if gap.size else None,
        float(np.nanmax(np.abs(ratio))) if ratio.size and not np.isnan(ratio).all() else None,
    )


def streams(row: Row) -> Streams:
    """Returns the tokens of a row."""
    segments: list[Segment] = []
    ids: list[list[int]] = []
    logp: list[list[Any]] = []
    versions: list[list[int]] = []
    for branch, (prompt, turns) in enumerate(parts_of(row)):
        ids.append(ints.decode(prompt))
        segments.append(Segment(AUTHORS.index("prompt"), len(ids[-1]), branch))
        for turn in turns:
            author = POLICY if turn.role == "assistant" else AUTHORS.index("tool")
            ids.append(ints.decode(turn.token_ids))
            segments.append(Segment(author, len(ids[-1]), branch))
            if author == POLICY:
                logp.append(numbers.decode(turn.rollout_logp))
                versions.append(turn.versions)
    return Streams(segments, _joined(ids, np.uint32), _joined(logp, np.float32), _joined(versions, np.int32))


def _joined(lists: list[list[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(each, kind) for each in lists]) if lists else np.zeros(0, kind)
