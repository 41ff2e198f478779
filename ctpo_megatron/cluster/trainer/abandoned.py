"""An abandoned update as the ranks tell it, put together again: each holds a shard of what it added to the micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ctpo_megatron.batch import Abandoned, AnchorStreams, TrainBatch
from ctpo_megatron.parallel import RankCoords, zigzag_unshard


def join_abandoned(parts: Sequence[Abandoned], coords: Sequence[RankCoords], batches: list[TrainBatch]) -> Abandoned:
    """The update that the ranks at `coords` abandoned, with the streams of whole micro-batches: `Abandoned.anchors`, [dp][n].

    `parts` are in the order of ranks, pipeline stages last. Where several stages have a stream, that of the last is whole.
    """
    first = parts[0]
    if first.at is None or not any(part.anchors for part in parts):
        return replace(first, anchors=[])
    shards: dict[tuple[int, int, int, str], Tensor] = {}  # (dp rank, micro-batch, cp rank, name): tp ranks have the same
    for part, place in zip(parts, coords, strict=True):
        for number, streams in enumerate(part.anchors[0]):
            shards |= {(place.dp_rank, number, place.cp_rank, name): stream for name, stream in streams.items()}
    names, cp_size = {name for *_, name in shards}, coords[0].cp_size

    def whole(dp_rank: int, number: int, cu_seqlens: Tensor) -> AnchorStreams:
        parts_of = {name: [shards[dp_rank, number, cp_rank, name] for cp_rank in range(cp_size)] for name in sorted(names)}
        return {name: zigzag_unshard(parts, cu_seqlens) for name, parts in parts_of.items()}

    rows = enumerate(batches[first.at].micro_batches)
    return replace(first, anchors=[[whole(dp, n, mb.sequences.cu_seqlens) for n, mb in enumerate(row)] for dp, row in rows])
