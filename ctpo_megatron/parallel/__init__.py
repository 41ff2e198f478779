"""Layouts of context parallelism, the scan across its ranks, and log-probs of words from hidden states."""

from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.parallel.context import ContextParallelScan, MicroBatchScans
from ctpo_megatron.parallel.layout import Layout, Pieces, own_experts, shard, shard_indices, unshard, zigzag_shard, zigzag_unshard
from ctpo_megatron.parallel.vocab import WordLogp, vocab_parallel_logp

__all__ = [
    "ContextParallelScan",
    "Layout",
    "MicroBatchScans",
    "Pieces",
    "RankCoords",
    "WordLogp",
    "own_experts",
    "shard",
    "shard_indices",
    "unshard",
    "vocab_parallel_logp",
    "zigzag_shard",
    "zigzag_unshard",
]
