"""The canary: one prompt whose log-probs the trainer and every server must agree on after each publication.

Digests prove that the weights have arrived; the canary proves that both sides compute the same model with them. Two engines
round differently, so the mean over the tokens is judged; the largest difference is only reported. A single token may differ
widely in a healthy run, most of all in a mixture of experts, where a near-tie of a router sends it elsewhere. docs/gpu.md says
what the bounds were taken from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctpo_megatron.batch import MicroBatch, Replay, Sequences, TokenStreams
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.parallel import zigzag_unshard

LENGTH = 64
# Largest mean difference of a token's log-prob that rounding explains, by the number format of the weights: of a dense model, of
# a mixture whose trainer follows the server's experts, and of one in which both choose for themselves.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}
REPLAYED = {"float32": 2e-4, "bfloat16": 0.15}
UNREPLAYED = {"float32": 1e-3, "bfloat16": 0.75}
QUANTISED = 1.0  # where servers keep weights in fp8; docs/precision.md says what it was taken from


@dataclass(frozen=True, slots=True)
class Gap:
    """Absolute differences of the log-probs of a canary's tokens, in nats. Infinite where a log-prob is NaN."""

    mean: float
    largest: float


def canary_tolerance(dtype: str, *, mixture: bool, replayed: bool, quantised: bool = False) -> float:
    """The bound on the mean difference for weights in `dtype`; `replayed`: the trainer follows the server's experts.

    `quantised`: the server keeps the weights in fp8.
    """
    if quantised:
        return QUANTISED
    if not mixture:
        return TOLERANCE[dtype]
    return REPLAYED[dtype] if replayed else UNREPLAYED[dtype]


def canary_tokens(vocab_size: int, version: int, texts: Sequence[Sequence[int]] = ()) -> list[int]:
    """Token ids of the prompt for a version: its number, as a token, and then pieces of `texts`; without any, random tokens.

    Engines agree better about text that the model knows than about random tokens, which are all improbable. The first token lets
    no prefix that older weights computed fit; its own log-prob is not asked for.
    """
    draw = random.Random(version)
    tokens = [version % vocab_size]
    if not any(texts):
        return tokens + draw.choices(range(vocab_size), k=LENGTH - 1)
    while len(tokens) < LENGTH:
        text = draw.choice(texts)
        tokens += text[draw.randrange(max(1, len(text) - LENGTH + 2)) :]
    return tokens[:LENGTH]


def canary_batch(token_ids: list[int], multiple: int, experts: Experts | None = None) -> MicroBatch:
    """The prompt as a micro-batch that the trainer computes log-probs of: label k is token k + 1.

    `multiple`: its length is filled up to one, as context and sequence parallelism want it; the last labels are then nothing.
    `experts`: those that the tokens of the prompt are to go to, [tokens, expert layers, top_k].
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
        None if experts is None else Replay(_filled_up(torch.tensor(experts), total)),
    )


def _filled_up(experts: Tensor, total: int) -> Tensor:
    """[total, expert layers, top_k]: `experts`, and -1 for the positions after the prompt."""
    return torch.cat([experts, experts.new_full((total - len(experts), *experts.shape[1:]), -1)])


def join_canary(shards: list[list[float]], length: int) -> list[float]:
    """Log-probs of tokens 1 ... `length` - 1 of the prompt, from the context-parallel ranks' parts of its micro-batch."""
    parts = [torch.tensor(shard) for shard in shards]
    bounds = torch.tensor([0, sum(map(len, shards))], dtype=torch.int32)
    return zigzag_unshard(parts, bounds)[: length - 1].tolist()


def canary_gap(trainer: list[float], server: list[float]) -> Gap:
    """How far the log-probs of tokens 1, 2, ... given those before them lie apart. Raises WeightSyncError for other counts."""
    if len(trainer) != len(server):
        raise WeightSyncError(f"the trainer has {len(trainer)} log-probs of the canary prompt, the server {len(server)}.")
    gaps = [abs(mine - theirs) for mine, theirs in zip(trainer, server, strict=True)]
    if any(gap != gap for gap in gaps):  # a NaN is as wrong as can be
        return Gap(float("inf"), float("inf"))
    return Gap(sum(gaps) / len(gaps), max(gaps))


def check_canary(url: str, version: int, gap: Gap, tolerance: float) -> None:
    """Check that the mean of `gap` is at most `tolerance`, which a NaN is not. Raises WeightSyncError."""
    if not gap.mean <= tolerance:
        raise WeightSyncError(
            f"{url} computes other log-probs than the trainer with version {version} of the weights: on the canary prompt they "
            f"differ by {gap.mean:.3g} on average (and by up to {gap.largest:.3g}), allowed is a mean of {tolerance:.3g} "
            "(attest.canary_tolerance). Its weights are those that were sent, so look at what differs in computing: number "
            "formats, attention backend, rotary embedding, quantisation."
        )
