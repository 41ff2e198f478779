"""Attention of a step that decodes, on CPUs in float32: one query for each sequence, shared out among threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctpo_megatron.engine.sglang.kernels import attention, scratch
from ctpo_megatron.kernels.cpu.addresses import address
from ctpo_megatron.kernels.cpu.lanes import LANES


@dataclass(frozen=True)
class Step:
    """B sequences of a batch."""

    rows: NDArray[np.int64]  # [B] of the table
    lens: NDArray[np.int64]  # [B] tokens, the new one included
    bounds: list[int]  # the first sequence of each thread, and B: threads read about as many keys


class Decoder:
    """Attention over the KV cache of `table` [requests, longest], int32: the slots of each request's tokens. By `threads`."""

    def __init__(self, table: Tensor, threads: int) -> None:
        if table.dtype != torch.int32 or not table.is_contiguous():
            raise ValueError(f"a table of {table.dtype}, strides {table.stride()}; needed: contiguous int32")
        self._table, self._threads = table, threads
        self._others = ThreadPoolExecutor(max(1, threads - 1))  # starts a thread when one is wanted

    @staticmethod
    def fits(q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Returns whether `attend` takes them."""
        same = q.dtype == keys.dtype == values.dtype == torch.float32
        return same and q.shape[-1] % LANES == 0 and keys.is_contiguous() and values.is_contiguous()

    def plan(self, rows: Tensor, lens: Tensor) -> Step:
        """Returns a step for the sequences at `rows` [B] of the table, `lens` [B] tokens long. Every layer uses it."""
        read = lens.long().numpy()
        ends = read.cumsum()
        shares = ends[-1] * np.arange(1, self._threads) // self._threads
        return Step(rows.long().numpy(), read, [0, *np.searchsorted(ends, shares).tolist(), len(read)])

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float) -> Tensor:
        """Returns the answers to `q` [B, heads, dim] in a layer's cache of keys and values [slots, key heads, dim], like `q`."""
        q, at_q = address(q)
        out = torch.empty(q.shape)
        heads, dim = q.shape[1:]
        longest, compiled = int(step.lens.max()), attention(dim)
        read = (
            *(at_q, keys.data_ptr(), values.data_ptr(), len(keys)),
            *(self._table.data_ptr(), *self._table.shape, step.rows.ctypes.data, step.lens.ctypes.data, len(step.lens)),
            *(scale, heads, keys.shape[1], out.data_ptr()),
        )

        def part(first: int, last: int) -> None:
            if first < last:
                compiled(*read, *scratch(heads, longest), first, last)

        shares = list(pairwise(step.bounds))
        others = [self._others.submit(part, *each) for each in shares[1:]]
        part(*shares[0])
        for other in others:
            other.result()
        return out
