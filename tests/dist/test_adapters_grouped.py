"""Adapters of experts that are kept in one layer, as TransformerEngine does on GPUs, compute what those of single experts do.

The layer stands in for TransformerEngine's; what calls it is megatron's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.adapters import ADAPTERS, Found, likelihood, merged_of, start, stir
from tests.support.families import MODELS
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist


def test_experts_in_one_layer_have_the_adapters_of_single_ones(tmp_path: Path) -> None:
    single, grouped = run_ranks(1, both, write_model(tmp_path, "qwen3_moe", 2, MODELS["qwen3_moe"]))[0]
    np.testing.assert_allclose(grouped["logp"], single["logp"], atol=1e-6)
    np.testing.assert_array_equal(grouped["off"], single["off"])
    assert np.abs(grouped["off"] - grouped["logp"]).max() > 1e-3
    for kind in ("gradients", "merged"):
        assert grouped[kind].keys() == single[kind].keys()
        for key, value in single[kind].items():
            np.testing.assert_allclose(grouped[kind][key], value, atol=1e-6, err_msg=key)


class Grouped(nn.Module):
    """Weights of all experts, for tokens that come one expert after the other; it says how many each has."""

    def __init__(self, num_gemms: int, inputs: int, outputs: int, *, config: Any, **_options: Any) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        for number in range(num_gemms):
            setattr(self, f"weight{number}", nn.Parameter(torch.zeros(outputs, inputs, dtype=config.params_dtype)))

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        parts = [tokens @ getattr(self, f"weight{number}").T for number, tokens in enumerate(x.split(m_splits))]
        return torch.cat(parts), None


def both(rank: RankInfo, path: Path) -> tuple[Found, Found]:
    from dataclasses import replace

    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    from ctpo_megatron.mcore.model import build

    sequential = build.layer_spec
    experts = ModuleSpec(TEGroupedMLP, submodules=MLPSubmodules(linear_fc1=Grouped, linear_fc2=Grouped))

    def in_one(*args: Any) -> Any:
        block = sequential(*args)
        for layer in block.layer_specs:
            mixture = layer.submodules.mlp
            layer.submodules.mlp = replace(mixture, submodules=replace(mixture.submodules, experts=experts))
        return block

    single = one(rank, path)
    with patch.object(build, "layer_spec", in_one):
        return single, one(rank, path)


def one(rank: RankInfo, path: Path) -> Found:
    from ctpo_megatron.mcore.model.lora import adapters_off

    engine = start(rank, path, ParallelConfig(), ADAPTERS["qwen3_moe"])
    stir(engine)
    packs = engine.place(micro_batches())
    found = {"logp": torch.cat(engine.logp(packs, 1.0)).numpy(), "merged": merged_of(engine)}
    with adapters_off(engine.models):
        found["off"] = torch.cat(engine.logp(packs, 1.0)).numpy()
    found |= likelihood(engine)
    engine.close()
    return found
