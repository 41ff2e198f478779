"""What the ranks kept of an update, put together again: token by token, in the order of the samples of the rollout batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ctpo_megatron.batch import KeptShard, TrainBatch
from ctpo_megatron.data.dumps import sequences_of
from ctpo_megatron.parallel import RankCoords, zigzag_unshard
from ctpo_megatron.record.token_files import NOT_TRAINED, STREAMS, TokenRecord

Kept = list[list[KeptShard]]
"""Of one rank: [optimizer step][micro-batch]; empty where it has none, or another rank has the same."""


def join_tokens(parts: Sequence[Kept], coords: Sequence[RankCoords], batches: list[TrainBatch]) -> TokenRecord | None:
    """Returns what the update on `batches` made of the tokens that the policy wrote; None where no rank kept anything.

    `parts` are in the order of ranks, which are at `coords`.
    """
    shards = {
        (number, place.dp_rank, n, place.cp_rank): shard
        for kept, place in zip(parts, coords, strict=True)
        for number, row in enumerate(kept)
        for n, shard in enumerate(row)
    }
    if not shards:
        return None
    cp_size = coords[0].cp_size
    samples: dict[int, dict[str, Tensor]] = {}
    for number, batch in enumerate(batches):
        for dp, row in enumerate(batch.micro_batches):
            for n, mb in enumerate(row):
                own = [shards[number, dp, n, cp] for cp in range(cp_size)]
                whole = {name: zigzag_unshard([getattr(each, name) for each in own], mb.sequences.cu_seqlens) for name in STREAMS}
                for _, rows, sample in sequences_of(mb):
                    own_tokens = rows[mb.tokens.mask[rows]]
                    samples[sample] = {name: stream[own_tokens] for name, stream in whole.items()}
        for sample, wrote in batch.spared.items():
            samples[sample] = _spared(wrote)
    ordered = [samples[sample] for sample in sorted(samples)]
    streams = {name: torch.cat([each[name] for each in ordered]).numpy() for name in STREAMS}
    return TokenRecord(np.array([len(each["fate"]) for each in ordered], np.int64), **streams)


def _spared(tokens: int) -> dict[str, Tensor]:
    """The streams of a sample that had no pass."""
    nothing = torch.full((tokens,), torch.nan, dtype=torch.float16)
    return {"gap": nothing, "log_ratio": nothing, "fate": torch.full((tokens,), NOT_TRAINED, dtype=torch.uint8)}
