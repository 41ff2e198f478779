"""Tiny models with adapters: what is trained of them, and one trainer rank after another."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.families import MODELS
from tests.support.ranks import at_own_port
from tests.support.tiny import micro_batches, write_model

LAYERS = 4
TOLERANCE = 1e-5
OPTIMIZER = OptimizerConfig(lr=2e-2, eps=0.1, weight_decay=0.1, clip_grad=1e3)
ADAPTERS = {
    "qwen3": LoraConfig(rank=3, alpha=12.0),  # tied embeddings, norms of queries and keys
    "qwen2": LoraConfig(rank=4, alpha=8.0, use_rslora=True, targets=("q_proj", "v_proj", "up_proj", "down_proj")),  # biases
    "qwen2 DoRA": LoraConfig(rank=3, alpha=6.0, use_dora=True),
    "qwen3_moe": LoraConfig(rank=2, alpha=8.0),
    # experts alone, whose projections have other names in the files; nothing outside them is trained
    "mixtral": LoraConfig(rank=3, alpha=6.0, targets=("gate_proj", "up_proj", "down_proj")),
}
Found = dict[str, Any]
Arrays = dict[str, NDArray[np.float32]]


def write_models(some: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory for each of ADAPTERS."""
    families = {name: name.partition(" ")[0] for name in ADAPTERS}
    return {name: write_model(some.mktemp(family), family, LAYERS, MODELS[family]) for name, family in families.items()}


def start(rank: RankInfo, path: Path, parallel: ParallelConfig, adapter: LoraConfig | None, **options: Any) -> TrainerRank:
    """A trainer rank whose adapters are drawn by seed 1."""
    return TrainerRank(str(path), parallel, OPTIMIZER, at_own_port(rank), device="cpu", seed=1, adapter=adapter, **options)


def adapters_of(engine: TrainerRank) -> Arrays:
    """What is trained, whole, on rank 0."""
    from ctpo_megatron.mcore.hf.stream import gather_adapters

    return {name: tensor.numpy().copy() for name, tensor in gather_adapters(engine.models, engine.shape, engine.adapter)}


def merged_of(engine: TrainerRank) -> Arrays:
    """What servers would be given, on rank 0."""
    return {name: tensor.numpy().copy() for bucket in engine.stream(1 << 20, to=0) for name, tensor in bucket}


def stir(engine: TrainerRank) -> None:
    """B is no longer zero, and the same at every layout; m not the lengths that it began with."""
    from ctpo_megatron.mcore.hf.adapters import own_piece
    from ctpo_megatron.mcore.model.lora import adapter_pairs

    with torch.no_grad():
        for pair in adapter_pairs(engine.models):
            seed = zlib.crc32(pair.adapted.b.name.encode())
            drawn = torch.randn(pair.adapted.b.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
            pair.b.copy_(own_piece(drawn, pair.adapted.b))
            if pair.m is not None:
                pair.m.mul_(1.25)


def likelihood(engine: TrainerRank) -> Found:
    """Loss and gradients of the masked mean negative log-likelihood."""
    from ctpo_megatron.algorithms import Stats
    from ctpo_megatron.mcore.host import megatron_region
    from ctpo_megatron.mcore.model.lora import adapter_parameters
    from ctpo_megatron.record.values import scalar

    packs = engine.place(micro_batches())
    count = sum(int(pack.tokens.mask.sum()) for pack in packs)

    def share(logp: torch.Tensor, mb: Any, _scan: Any) -> Any:
        return -torch.where(mb.tokens.mask, logp, 0.0).sum() / count, Stats()

    with megatron_region(engine.device):
        values = engine._stepper.forward_backward(packs, share, 1.0)
    gradients = {tensor.name: p.main_grad.numpy().copy() for tensor, p in adapter_parameters(engine.models)}
    return {"loss": scalar(values["loss"]), "gradients": gradients}
