"""What a trainer rank does within a call, as spans for the time of a trace: passes, the optimizer, collectives.

Collectives are seen where torch's Python functions hand them to a process group, Megatron's too. With gloo a span reaches to the
end of the collective on this rank. With NCCL it reaches to where the call returns: the GPU does the work later, and
`trace.profiler` shows when.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

from ctpo_megatron.mcore.rank import TrainerRank
from ctpo_megatron.record.spans import OpenSpan, Spans, around, replaced

TRACK = "collectives"
COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "gather",
    "scatter",
    "barrier",
    "send",
    "recv",
    "recv_anysource",
)


def trace_rank(rank: TrainerRank, spans: Spans) -> Callable[[], None]:
    """Gather the spans of what `rank` does from now on. Returns what ends that."""
    ends = [
        around(rank, "shard", spans, "shard"),
        around(rank, "logp", spans, "log-probs"),
        around(rank, "logp_and_values", spans, "log-probs and values"),
        around(rank, "train_step", spans, "optimizer step"),
        around(rank, "_optimizer_step", spans, "optimizer"),
        around(rank._stepper, "forward_backward", spans, "forward and backward"),
        around(rank._stepper, "reduce", spans, "statistics"),
        around(schedules, "forward_step", spans, "forward"),
        around(schedules, "backward_step", spans, "backward"),
        *_trace_collectives(spans),
    ]

    def end() -> None:
        for each in reversed(ends):
            each()

    return end


def _trace_collectives(spans: Spans) -> list[Callable[[], None]]:
    waiting: dict[int, OpenSpan] = {}  # by their works, of those that tell of their end only by being waited for
    counts: Counter[str] = Counter()
    ends = []
    for name in COLLECTIVES:
        if hasattr(dist.ProcessGroup, name):
            ends.append(replaced(dist.ProcessGroup, name, _collective(name, spans, counts, waiting)))
    wait = dist.Work.wait

    def waited(work: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return wait(work, *args, **kwargs)
        finally:
            if (span := waiting.pop(id(work), None)) is not None:
                spans.end(span)

    return [*ends, replaced(dist.Work, "wait", waited)]


def _collective(name: str, spans: Spans, counts: Counter[str], waiting: dict[int, OpenSpan]) -> Callable[..., Any]:
    inner = getattr(dist.ProcessGroup, name)

    @functools.wraps(inner)
    def spanned(group: Any, *args: Any, **kwargs: Any) -> Any:
        counts[group.group_name] += 1
        described = {"group": group.group_name, "of": group.group_desc, "ranks": group.size(), "bytes": _bytes(args)}
        span = spans.begin(name.strip("_").removesuffix("_base"), TRACK, number=counts[group.group_name], **described)
        try:
            work = inner(group, *args, **kwargs)
        except BaseException:
            spans.end(span)
            raise
        if not isinstance(work, dist.Work) or _on_gpu(args):
            spans.end(span)
            return work
        try:
            work.get_future().add_done_callback(lambda _: spans.end(span))
        except (RuntimeError, NotImplementedError):  # of sends and receives there is none
            waiting[id(work)] = span
        return work

    return spanned


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _bytes(args: Iterable[Any]) -> int:
    with contextlib.suppress(RuntimeError):
        return sum(tensor.nbytes for tensor in _tensors(args))
    return 0


def _on_gpu(args: Iterable[Any]) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(args))
