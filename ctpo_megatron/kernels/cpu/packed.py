"""`cpu.attention` on torch tensors: which threads take which sequences, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctpo_megatron.kernels.cpu import attention as k
from ctpo_megatron.kernels.cpu.addresses import has_numbers
from ctpo_megatron.kernels.cpu.lanes import LANES
from ctpo_megatron.kernels.cpu.threads import in_threads

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """N sequences, each a run of this rank's queries that looks at keys by their rows, in the order of their positions."""

    q_bounds: Places  # [N + 1] borders of the queries
    visible: Places  # [T] how many keys each query sees, ascending within a sequence; its position is one less
    k_bounds: Places  # [N + 1] borders in k_rows
    k_rows: Places  # rows of the keys, those that a sequence shares with others first
    order: Places  # [N] sequences, those that share keys together
    unit_bounds: Places  # [units + 1] borders in order: no two units have keys in common
    works: Places  # [units] how long each takes, roughly

    @classmethod
    def of(cls, q_bounds: Places, visible: Places, k_bounds: Places, k_rows: Places, roots: Places) -> Packing:
        """Returns the packing of sequences of which those with the same of `roots` [N] may share keys."""
        order = np.argsort(roots, kind="stable")
        begun = np.flatnonzero(np.diff(roots[order], prepend=-1))
        seen = np.concatenate([[0], np.cumsum(visible)])
        per_sequence = (seen[q_bounds[1:]] - seen[q_bounds[:-1]])[order]
        works = np.add.reduceat(per_sequence, begun) if len(begun) else np.zeros(0, np.int64)
        return cls(q_bounds, visible, k_bounds, k_rows, order, np.append(begun, len(order)), works)

    @property
    def last_row(self) -> int:
        """The highest row of a key; -1 where there is none."""
        return int(self.k_rows.max(initial=-1))

    @property
    def longest(self) -> int:
        """The most keys that a sequence has."""
        return int(np.diff(self.k_bounds).max(initial=0))

    def shares(self, heads: int, threads: int) -> list[tuple[int, int]]:
        """Runs (first, last) of units times `heads` for as many threads, of about as much work."""
        ends = np.cumsum(np.repeat(self.works, heads))
        if not len(ends):
            return []
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads, side="right")
        return [(int(a), int(b)) for a, b in pairwise([0, *cuts, len(ends)]) if a < b]


def _require(inputs: tuple[Tensor, ...], packing: Packing, turns: Tensor) -> None:
    """Raise ValueError for what the compiled functions, which look at no bound, would read or write beside their tensors."""
    query, key, value = inputs
    dim = query.shape[2]
    faults = {
        "other numbers than float32 on a CPU": any(x.dtype != torch.float32 or x.device.type != "cpu" for x in (*inputs, turns)),
        f"heads of {[x.shape[2] for x in inputs]} numbers; allowed: all the same, a multiple of {LANES}": dim % LANES != 0
        or any(x.shape[2] != dim for x in inputs),
        "heads whose numbers do not lie in one row": any(x.numel() > 0 and x.stride(2) != 1 for x in inputs),
        f"{key.shape[:2]} keys and {value.shape[:2]} values for {query.shape[1]} query heads": key.shape != value.shape
        or query.shape[1] % key.shape[1] != 0,
        f"{len(query)} queries, and sequences with {packing.q_bounds[-1]}": len(query) != packing.q_bounds[-1],
        f"{len(key)} keys, and sequences with row {packing.last_row}": packing.last_row >= len(key),
        f"cosines and sines of {turns.shape[1]} positions, and a sequence has {packing.longest}": turns.shape[2] > 0
        and turns.shape[1] < packing.longest,
        f"{2 * turns.shape[2]} turned numbers of a head of {dim}": 2 * turns.shape[2] > dim,
    }
    if found := [words for words, wrong in faults.items() if wrong]:
        raise ValueError("; ".join(found))


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, turns: Tensor, scale: float) -> Tensor:
    """Returns [T, heads, dim]: what the queries [T, heads, dim] see of key and value [rows, key heads, dim].

    `turns` [2, longest, half]: cosines and sines by which the first 2 * `half` numbers of queries and keys are turned. Raises
    ValueError for what does not fit together.
    """
    _require((query, key, value), packing, turns)
    return _Attend.apply(query, key, value, packing, turns, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, turns: Tensor, scale: float) -> Tensor:
        out, logs = query.new_empty(query.shape), query.new_empty(query.shape[:2])
        if has_numbers(query):
            arrays = (*map(_flat, (query, key, value)), _flat(out), _flat(logs))
            _run(k.forward, 0, arrays, (query, key, value), packing, turns, scale)
        ctx.save_for_backward(query, key, value, out, logs, turns)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logs, turns = ctx.saved_tensors
        to_query, to_key, to_value = query.new_empty(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
        if not has_numbers(query):
            return to_query, to_key, to_value, None, None, None
        given = (*map(_flat, (query, key, value)), _flat(out), _flat(logs), _flat(grad.contiguous()))
        arrays = (*given, *map(_flat, (to_query, to_key, to_value)))
        _run(k.backward, 1, arrays, (query, key, value), ctx.packing, turns, ctx.scale)
        return to_query, to_key, to_value, None, None, None


def _run(
    compiled: Any, way: int, arrays: tuple, inputs: tuple[Tensor, ...], packing: Packing, turns: Tensor, scale: float
) -> None:
    """Call a pass of `attention` for all units, by torch's number of threads. `inputs`: query, key and value."""
    query, key, _ = inputs
    heads, dim, size = (query.shape[1], key.shape[1]), query.shape[2], k.scratch_sizes(packing.longest, query.shape[2])[way]
    strides = tuple(each.stride()[:2] for each in inputs)
    told = (*strides, heads, dim, turns.numpy(), scale, packing.q_bounds, packing.visible, packing.k_bounds, packing.k_rows)

    def take(first: int, last: int) -> None:
        compiled(*arrays, *told, packing.order, packing.unit_bounds, first, last, np.empty(size, np.float32))

    in_threads(take, packing.shares(heads[1], torch.get_num_threads()))


def _flat(x: Tensor) -> NDArray[np.float32]:
    """The numbers from the first of `x` to its last, in memory's order. The last dimension lies in one row."""
    x = x.detach()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((extent,), (1,)).numpy()
