"""Rotary embeddings of sequences that do not begin at position 0: those whose beginning is shared with others.

Megatron-Core 0.16.1 makes them for positions from 0 on and gives every packed sequence the first ones, unless it is handed as
many as the micro-batch has positions; then position t of the micro-batch gets the t-th
(`megatron.core.models.common.embeddings.rope_utils`). So the model's module hands it these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.mcore.model.attention import PackedLayout


@contextmanager
def rotary_positions(model: torch.nn.Module, packed: PackedSeqParams) -> Iterator[None]:
    """Have `model` embed the positions of `packed`, where it has any of its own."""
    positions = packed.positions if isinstance(packed, PackedLayout) else None
    if positions is None:
        yield
        return

    def at_positions(_module: torch.nn.Module, _given: Any, made: Any) -> Any:
        if isinstance(made, tuple):  # YaRN's come with a factor
            return _chosen(made[0], positions), *made[1:]
        return _chosen(made, positions)

    handle = unwrap(model).rotary_pos_emb.register_forward_hook(at_positions)
    try:
        yield
    finally:
        handle.remove()


def _chosen(embeddings: Tensor, positions: Tensor) -> Tensor:
    """[T, 1, 1, d] of the positions [T] among [longest, 1, 1, d]."""
    return embeddings.index_select(0, positions.to(embeddings.device))
