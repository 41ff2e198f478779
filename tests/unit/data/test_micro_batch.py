"""A micro-batch in parts: context parallelism cuts what is per token, and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from ctpo_megatron.batch import MicroBatch, TokenStreams
from ctpo_megatron.data.packing import pack
from ctpo_megatron.types import Supports, TopK, TrainSample


def micro_batch() -> MicroBatch:
    samples = [
        TrainSample(list(range(n)), list(range(n)), [True] * n, [-0.5] * n, [0] * n, [1.0] * n, top_k=TopK.unused(n, 3), group=n)
        for n in (8, 12)
    ]
    added = {"supports": Supports.none, "rewards": lambda length: [0.0] * length, "teacher_logp": lambda length: [-1.0] * length}
    samples = [replace(s, teacher=1, **{name: made(len(s)) for name, made in added.items()}) for s in samples]
    ((whole,),) = pack(samples, dp=1, max_tokens=64, cp=2)
    positions = torch.arange(whole.positions)
    whole = replace(whole, sequences=replace(whole.sequences, prefixes=torch.tensor([-1, 0])))
    found = dict.fromkeys(("anchor_logp", "reference_logp", "old_values", "returns", "values"), positions)
    return whole.with_streams(**found, policy_top_k_logp=whole.tokens.top_k_logp)


def test_every_stream_is_cut_and_no_sequence_is() -> None:
    whole = micro_batch()
    shards = [whole.shard(rank, 2) for rank in range(2)]
    for field in fields(TokenStreams):
        assert [len(getattr(shard.tokens, field.name)) for shard in shards] == [whole.positions // 2] * 2, field.name
    assert sorted(torch.cat([shard.tokens.anchor_logp for shard in shards]).tolist()) == list(range(whole.positions))
    for shard in shards:
        assert shard.sequences is whole.sequences
        assert (len(shard), shard.positions) == (len(whole), whole.positions)


def test_streams_are_exchanged_by_name() -> None:
    whole = micro_batch()
    changed = whole.with_streams(advantages=torch.zeros(whole.positions))
    assert not changed.tokens.advantages.any()
    assert whole.tokens.advantages.any()
    assert changed.tokens.labels is whole.tokens.labels
    with pytest.raises(TypeError, match="cu_seqlens"):
        whole.with_streams(cu_seqlens=whole.sequences.cu_seqlens)


def test_all_parts_go_to_the_device() -> None:
    moved = micro_batch().to(torch.device("meta"))
    tensors = [getattr(part, f.name) for part in (moved.tokens, moved.sequences) for f in fields(part)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
