"""Segmented scans as loops over tokens: what `LocalScan` and `ContextParallelScan` are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Channel
from ctpo_megatron.algorithms.operators import AFFINE, MAX, MIN, RAMP, SUM, Operator
from ctpo_megatron.algorithms.scan import Reach

FORWARD, BACKWARD = ("prefix", "before", "sequence"), ("suffix", "after")
REACHES: tuple[Reach, ...] = (*FORWARD, *BACKWARD)
UNIT = 2.0**-38  # of exact sums


class Loop(NamedTuple):
    """An operator, one token after another."""

    operator: Operator
    start: Any
    step: Callable[[Any, Any], Any]  # (state, value of a token) -> state
    result: Callable[[Any], float] = lambda state: state


LOOPS = {
    "sum": Loop(SUM, 0.0, lambda total, x: total + x),
    "exact sum": Loop(SUM, 0, lambda total, x: total + round(min(max(x, -20.0), 20.0) / UNIT), lambda total: total * UNIT),
    "count": Loop(SUM, 0, lambda count, counts: count + counts, float),
    "min": Loop(MIN, math.inf, min),
    "max": Loop(MAX, -math.inf, max),
    "affine": Loop(AFFINE, 0.0, lambda y, ab: ab[0] * y + ab[1]),
    "ramp": Loop(RAMP, (0, 0.0), lambda nx, kx: (nx[0] + kx[0], nx[1] + nx[0] * kx[1]), lambda nx: nx[1]),
}


def scan_by_loop(
    loop: Loop, values: Sequence[Any], lengths: Sequence[int], reach: Reach, restarts: Sequence[bool] | None
) -> tuple[list[float], list[float]]:
    """Results of all tokens (none for `sequence`), and of all sequences."""
    found: list[float] = []
    totals: list[float] = []
    begin = 0
    for length in lengths:
        tokens = range(begin, begin + length)
        begin += length
        state, at = loop.start, {}
        for t in reversed(tokens) if reach in BACKWARD else tokens:
            if restarts is not None and restarts[t]:
                state = loop.start
            before, state = state, loop.step(state, values[t])
            at[t] = before if reach in ("before", "after") else state
        totals.append(loop.result(state))
        found += [] if reach == "sequence" else [loop.result(at[t]) for t in tokens]
    return found, totals


class Asked(NamedTuple):
    """A channel, and the loop and values that it is."""

    name: str
    channel: Channel
    loop: Loop
    values: list[Any]


def every_channel(x: Tensor, other: Tensor, mask: Tensor, restarts: Tensor, *, exact: bool) -> list[Asked]:
    """Every operator in every reach, and with restarts where they are allowed; masked tokens [T] carry identities.

    `x` [T] are values, `other` [T] in [0, 1] the factors of affine maps.
    """
    held = torch.where(mask, x, 0.0)
    streams = {
        "exact sum" if exact else "sum": held,
        "count": mask,
        "min": torch.where(mask, x, math.inf),
        "max": torch.where(mask, x, -math.inf),
        "affine": torch.stack([torch.where(mask, other, 1.0), held]),
        "ramp": torch.stack([mask.to(x.dtype), held]),
    }
    asked = []
    for name, stream in streams.items():
        loop, values = LOOPS[name], stream.T.tolist() if stream.dim() == 2 else stream.tolist()
        for reach in REACHES:
            asked.append(Asked(f"{name} {reach}", Channel(stream, loop.operator, reach), loop, values))
            if reach in FORWARD:
                again = Channel(stream, loop.operator, reach, restarts)
                asked.append(Asked(f"{name} {reach} with restarts", again, loop, values))
    return asked


def expected(asked: Asked, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values and totals of a channel by loop, float64."""
    restarts = None if asked.channel.restarts is None else asked.channel.restarts.tolist()
    values, totals = scan_by_loop(asked.loop, asked.values, lengths, asked.channel.reach, restarts)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(totals, dtype=torch.float64)


def borders(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
