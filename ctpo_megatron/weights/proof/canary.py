"""The canary: one prompt whose log-probs the trainer and every server must agree on after each publication.

Digests prove that the weights have arrived; the canary proves that both sides compute the same model with them.
"""

from __future__ import annotations

import random

import torch

from ctpo_megatron.batch import MicroBatch, Sequences, TokenStreams
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.parallel import zigzag_unshard

LENGTH = 64
# Largest difference of a token's log-prob that rounding explains, by the number format of the weights.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def canary_tokens(vocab_size: int, version: int) -> list[int]:
    """Token ids of the prompt for a version; each version has its own, so that no prefix cache answers with older weights."""
    return random.Random(version).choices(range(vocab_size), k=LENGTH)


def canary_batch(token_ids: list[int], multiple: int) -> MicroBatch:
    """The prompt as a micro-batch that the trainer computes log-probs of: label k is token k + 1.

    `multiple`: its length is filled up to one, as context and sequence parallelism want it; the last labels are then nothing.
    """
    length = len(token_ids)
    total = -(-length // multiple) * multiple
    tokens = torch.tensor(token_ids + [0] * (total - length + 1))
    return MicroBatch(
        TokenStreams(
            input_ids=tokens[:-1],
            labels=tokens[1:],
            position_ids=torch.arange(total),
            mask=torch.arange(total) < length - 1,
            advantages=torch.zeros(total),
            rollout_logp=torch.zeros(total),
            versions=torch.full((total,), -1, dtype=torch.int32),
            restarts=torch.zeros(total, dtype=torch.bool),
        ),
        Sequences(
            cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
            lengths=torch.tensor([length]),
            groups=torch.zeros(1, dtype=torch.int64),
            weights=torch.ones(1, dtype=torch.float64),
            ids=torch.zeros(1, dtype=torch.int64),
        ),
    )


def join_canary(shards: list[list[float]], length: int) -> list[float]:
    """Log-probs of tokens 1 ... `length` - 1 of the prompt, from the context-parallel ranks' parts of its micro-batch."""
    parts = [torch.tensor(shard) for shard in shards]
    bounds = torch.tensor([0, sum(map(len, shards))], dtype=torch.int32)
    return zigzag_unshard(parts, bounds)[: length - 1].tolist()


def canary_gap(trainer: list[float], server: list[float]) -> float:
    """Largest absolute difference of the log-probs of tokens 1, 2, ... given those before them."""
    if len(trainer) != len(server):
        raise WeightSyncError(f"the trainer has {len(trainer)} log-probs of the canary prompt, the server {len(server)}.")
    gaps = [abs(mine - theirs) for mine, theirs in zip(trainer, server, strict=True)]
    return max(gaps) if all(gap == gap for gap in gaps) else float("inf")  # a NaN is as wrong as can be


def check_canary(url: str, version: int, gap: float, tolerance: float) -> None:
    """Check that `gap` is at most `tolerance`, which a NaN is not. Raises WeightSyncError."""
    if not gap <= tolerance:
        raise WeightSyncError(
            f"{url} computes other log-probs than the trainer with version {version} of the weights: on the canary prompt they "
            f"differ by up to {gap:.3g}, allowed is {tolerance:.3g} (attest.canary_tolerance). Its weights are those that were "
            "sent, so look at what differs in computing: number formats, attention backend, rotary embedding, quantisation."
        )
