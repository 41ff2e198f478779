"""The distributed optimizer's state, gathered from the data-parallel ranks in pieces of a bounded size.

Megatron-Core 0.16.1 gathers each bucket of a gradient buffer at once: on the GPU, in float32, the whole bucket and this rank's
share of it. There is one bucket per buffer unless gradients are reduced while the backward pass runs, and always one on the
stages behind the first (DistributedDataParallel.__init__), so smaller buckets are no way out. For 3.6 G parameters that is 20 GB.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from ctpo_megatron.parallel.gather import all_gather_single

STATES = ("param", "exp_avg", "exp_avg_sq")
GATHERED = 2**26  # numbers on the device at a time, of all ranks together


@contextlib.contextmanager
def gathered_in_pieces(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside it megatron gathers an optimizer's state by `whole_state`. Padding must count: see `padding_counted`."""
    parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
    for part in parts:
        part.get_parameter_state_dp_zero = functools.partial(_state, part, part.get_parameter_state_dp_zero)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero  # the class's own again


def _state(part: Any, megatrons: Any, *, empty_data: bool = False, **options: Any) -> Any:
    """megatron's answer where nothing is gathered, as for loading."""
    return megatrons(empty_data=True, **options) if empty_data else whole_state(part)


def whole_state(part: Any) -> dict[Any, Any]:
    """Returns what megatron's `get_parameter_state_dp_zero` returns on all ranks: each buffer's states, whole, in host memory."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, buckets),) = ranges.items()
        whole = {key: torch.empty(buffer.numel, dtype=torch.float32, device=torch.device("cpu")) for key in STATES}
        begin = 0
        for bucket, bucket_ranges in zip(buffer.buckets, buckets, strict=True):
            end = begin + bucket.grad_data.numel()
            for key in STATES:
                share = _share(part, bucket_ranges["param_map"], key, (end - begin) // part.data_parallel_group.size())
                _gather(share, whole[key][begin:end], bucket.grad_data.device, part.data_parallel_group)
            begin = end
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel}}
    return state


def _share(part: Any, ranges: dict[Any, Any], key: str, size: int) -> Tensor:
    """Returns this rank's share of a bucket of one state, [size] float32 in host memory, zeros where it has padding."""
    share = torch.zeros(size, dtype=torch.float32, device=torch.device("cpu"))
    for parameter, place in ranges.items():
        own = place["gbuf_local"]
        share[own.start : own.end].copy_(part._get_main_param_and_optimizer_states(parameter)[key].detach())
    return share


def _gather(share: Tensor, whole: Tensor, device: torch.device, group: dist.ProcessGroup) -> None:
    """Fill `whole` with the shares of all ranks, one after the other."""
    ranks = group.size()
    rows = whole.view(ranks, -1)
    for piece, room in zip(share.split(max(1, GATHERED // ranks)), rows.split(max(1, GATHERED // ranks), dim=1), strict=True):
        gathered = torch.empty(ranks * len(piece), dtype=torch.float32, device=device)
        all_gather_single(gathered, piece.to(device), group)
        room.copy_(gathered.view(ranks, -1))
