"""Associative operators, and their scan over segments of a stream.

An operator works on states: K rows of numbers that summarise a run of tokens. `combine` joins the states of two neighbouring
runs; its last row is the result. That it is associative is all that a scan over context-parallel pieces needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.kernels.numbers import FRACTION_BITS as FRACTION_BITS
from ctpo_megatron.kernels.numbers import MAX_ABS as MAX_ABS

BLOCK = 2**15  # elements that a scan by rounds works on at once
MAX_TOKENS = int(2**63 / (MAX_ABS * 2**FRACTION_BITS))


class Operator(NamedTuple):
    """A monoid on states [K, ...]."""

    identity: tuple[float, ...]  # the state of no tokens
    combine: Callable[[Tensor, Tensor], Tensor]  # (earlier [K, ...], later [K, ...]) -> [K, ...]

    def empty_like(self, state: Tensor) -> Tensor:
        """The identity as [K, 1, ...], to be broadcast against `state` [K, ...]."""
        return torch.stack([state.new_full([1] * (state.dim() - 1), number) for number in self.identity])


def _affine(earlier: Tensor, later: Tensor) -> Tensor:
    return torch.stack([earlier[0] * later[0], later[0] * earlier[1] + later[1]])


def _ramp(earlier: Tensor, later: Tensor) -> Tensor:
    (n1, s1, m1), (n2, s2, m2) = earlier, later
    return torch.stack([n1 + n2, s1 + s2, m1 + m2 + n1 * s2])


SUM = Operator((0.0,), torch.add)
WIDE_SUM = Operator((0.0,), torch.add)
"""A sum of values of any size, always in float64: the last bits depend on the order."""
MIN = Operator((float("inf"),), torch.minimum)
MAX = Operator((-float("inf"),), torch.maximum)
AFFINE = Operator((1.0, 0.0), _affine)
"""Composition of y -> a y + b; values [2, T] are a and b, the result is what 0 becomes."""
RAMP = Operator((0.0, 0.0, 0.0), _ramp)
"""Sum of k x, where k counts the marked tokens before x; values [2, T] are the marks (0 or 1) and x."""


def to_fixed(values: Tensor) -> Tensor:
    """Fixed-point int64 of `values`, held to +-20; booleans count as 0 and 1."""
    wide = values.detach().to(torch.float64, copy=True)
    return wide.clamp_(-MAX_ABS, MAX_ABS).mul_(2.0**FRACTION_BITS).round_().to(torch.int64)


def from_fixed(values: Tensor) -> Tensor:
    """float64 of fixed-point int64 `values`."""
    return values.to(torch.float64).mul_(2.0**-FRACTION_BITS)


def check_length(tokens: int) -> None:
    """Raise ValueError when sums over so many tokens could overflow."""
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens in one pack; exact prefix sums hold up to {MAX_TOKENS}. Use smaller micro-batches.")


def lift(operator: Operator, values: Tensor, exact: bool) -> Tensor:
    """States [K, T] of single tokens: int64 fixed point for exact sums, as they are for extremes, float64 for all else."""
    if operator is SUM and exact:
        return to_fixed(values).unsqueeze(0)
    if operator in (MIN, MAX):
        return values.detach().unsqueeze(0).clone()
    if operator is RAMP:
        state = values.new_zeros((3, values.shape[-1]), dtype=torch.float64)
        state[:2] = values.detach()
        return state
    state = values.detach().to(torch.float64, copy=True)  # a scan overwrites it
    return state if state.dim() == 2 else state.unsqueeze(0)


def lower(state: Tensor) -> Tensor:
    """The result in states [K, ...], as floating point [...]."""
    return from_fixed(state[-1]) if state.dtype == torch.int64 else state[-1]


def piece_sums(state: Tensor, bounds: Tensor) -> Tensor:
    """Inclusive sums of int64 `state` [K, T], anew in each piece with borders `bounds` [M+1]. Overwrites `state`.

    A running sum over everything gives what lies before each piece; taken off at the piece's first token, it makes a second
    running sum begin anew there. The first may wrap around: what counts are differences.
    """
    running, starts = torch.cumsum(state, dim=-1), bounds[:-1]
    before = torch.where(starts > 0, running.index_select(-1, (starts - 1).clamp(min=0)), 0)
    change = torch.diff(before, dim=-1, prepend=torch.zeros_like(before[:, :1]))
    last = state.shape[-1] - 1
    state.index_add_(-1, starts.clamp(max=last), torch.where(starts <= last, -change, 0))  # empty pieces at the end begin nowhere
    return torch.cumsum(state, dim=-1, out=running)


def segment_scan(operator: Operator, state: Tensor, first: Tensor) -> Tensor:
    """Inclusive scan of `state` [K, ..., T] along its last dimension, anew in each segment. Overwrites `state`.

    `first` [..., T] is where the segment of each element begins. Exact sums are differences of one running sum, which may wrap
    around. All else takes log2(T) rounds in which every element joins the run that ends before its own (Hillis and Steele 1986),
    in blocks from the end, so that a round needs no second copy.
    """
    if state.dtype == torch.int64 and first.dim() == 1:
        running = torch.cumsum(state, dim=-1)
        before = state.neg_().add_(running)
        return running.sub_(before.index_select(-1, first))
    length, shift = state.shape[-1], 1
    while shift < length:
        for end in range(length, shift, -BLOCK):
            begin = max(end - BLOCK, shift)
            here, back = slice(begin, end), slice(begin - shift, end - shift)
            joined = operator.combine(state[..., back], state[..., here])
            reaches = torch.arange(begin - shift, end - shift, device=state.device) >= first[..., here]
            state[..., here] = torch.where(reaches, joined, state[..., here])
        shift *= 2
    return state
