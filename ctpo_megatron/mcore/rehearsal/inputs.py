"""Micro-batches of a rehearsal: one sequence that fills them, with experts chosen evenly."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ctpo_megatron.batch import MicroBatch, Replay, Sequences, TokenStreams
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.models.shape import ModelShape


def full_micro_batch(tokens: int, shape: ModelShape, algorithm: AlgorithmConfig, *, replay: bool) -> MicroBatch:
    """A whole micro-batch of one sequence of `tokens` positions, with every stream that a step of `algorithm` needs."""
    zeros, k = torch.zeros(tokens), algorithm.top_k
    streams = TokenStreams(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        labels=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.arange(tokens),
        mask=torch.ones(tokens, dtype=torch.bool),
        advantages=torch.ones(tokens),
        rollout_logp=zeros,
        versions=torch.zeros(tokens, dtype=torch.int32),
        restarts=torch.zeros(tokens, dtype=torch.bool),
        anchor_logp=zeros.clone(),
        reference_logp=zeros.clone() if algorithm.reference is not None else None,
        teacher_logp=zeros.clone() if algorithm.distillation is not None else None,
        top_k_ids=torch.arange(k, dtype=torch.int32).repeat(tokens, 1) if k else None,
        top_k_logp=torch.zeros(tokens, k) if k else None,
    )
    sequences = Sequences(
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        lengths=torch.tensor([tokens]),
        groups=torch.zeros(1, dtype=torch.int64),
        weights=torch.ones(1, dtype=torch.float64),
        ids=torch.zeros(1, dtype=torch.int64),
        teachers=torch.zeros(1, dtype=torch.int64) if algorithm.distillation is not None else None,
    )
    return MicroBatch(streams, sequences, Replay(even_routing(tokens, shape)) if replay and shape.routing else None)


def even_routing(tokens: int, shape: ModelShape) -> Tensor:
    """[tokens, expert layers, k], in the number format of a record: every expert is chosen equally often in each layer."""
    routing = shape.routing
    if routing is None:
        raise ValueError("a dense model has no routing")
    chosen = torch.arange(tokens * routing.top_k).remainder(routing.experts).view(tokens, 1, routing.top_k)
    number_format = torch.from_numpy(routing.unknown(0)).dtype
    return chosen.to(number_format).expand(tokens, len(routing.expert_layers), routing.top_k).contiguous()


def even(total: int, parts: int) -> NDArray[np.int64]:
    """[parts] whole numbers as equal as can be, that add up to `total`: tokens of each expert."""
    return np.diff(np.arange(parts + 1) * total // parts)


def faked(value: Any, mode: FakeTensorMode, made: list[Tensor]) -> Any:
    """A copy of `value`, a tensor or dataclasses and lists of them, with fake tensors, which are added to `made`.

    The borders of sequences keep their values: rotation cuts a micro-batch there.
    """
    if isinstance(value, Tensor):
        made.append(mode.from_tensor(value.clone()))
        return made[-1]
    if isinstance(value, list):
        return [faked(each, mode, made) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: faked(getattr(value, f.name), mode, made) for f in fields(value) if not f.name.startswith("cu_seqlens")
        }
        return replace(value, **changed)
    return value
