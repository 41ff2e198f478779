"""Layouts of context parallelism, the scan across its ranks, and log-probs from vocab-parallel logits."""

from ctpo_megatron.parallel.context import ContextParallelScan
from ctpo_megatron.parallel.layout import Layout, shard, shard_indices, unshard, zigzag_shard, zigzag_unshard
from ctpo_megatron.parallel.vocab import vocab_parallel_logp

__all__ = [
    "ContextParallelScan",
    "Layout",
    "shard",
    "shard_indices",
    "unshard",
    "vocab_parallel_logp",
    "zigzag_shard",
    "zigzag_unshard",
]
