"""Which tensors adapters are made of, which models cannot have them, and what of peft's files is taken or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ctpo_megatron.config.adapter import TARGETS, LoraConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.errors import ConfigError, ModelError
from ctpo_megatron.models.adapters import adapted_tensors, adapter_tensors, check_adapter
from ctpo_megatron.models.peft import CONFIG_FILE, PREFIX, check_peft_config, check_peft_names, peft_config, read_peft_config
from ctpo_megatron.models.shape import Experts, HeadAttention, LatentAttention, ModelShape, Rope
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.planning.parameters import stage_adapters


def shape(**changes: Any) -> ModelShape:
    sizes = {
        "family": "qwen3",
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_heads": 4,
        "attention": HeadAttention(num_kv_heads=2, head_dim=16),
        "vocab_size": 99,
        "max_positions": 64,
        "rope": Rope(1e4),
        "rms_eps": 1e-6,
        "tie_embeddings": True,
    }
    return ModelShape(**{**sizes, **changes})


def test_every_projection_has_a_pair_that_multiplies_to_it_and_is_cut_as_it_is() -> None:
    pairs = adapted_tensors(shape(), LoraConfig(rank=3))
    assert len(pairs) == 2 * len(TARGETS)
    for pair in pairs:
        assert (pair.b.shape[0], pair.a.shape[1]) == pair.base.shape
        assert pair.a.shape[0] == pair.b.shape[1] == 3
        cuts = (pair.b.cut.dim, pair.a.cut.dim)
        assert cuts == ((None, 1) if pair.base.cut.dim == 1 else (0, None))
    keys = [tensor.key for tensor in adapter_tensors(shape(), LoraConfig())]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {tensor.key for tensor in hf_tensors(shape())}


def test_targets_come_in_one_order_and_once() -> None:
    assert LoraConfig(targets=("o_proj", "q_proj")).targets == ("q_proj", "o_proj")
    with pytest.raises(ValidationError, match="twice"):
        LoraConfig(targets=("q_proj", "q_proj"))
    with pytest.raises(ValidationError):
        LoraConfig(targets=())


def test_scale_is_that_of_the_two_papers() -> None:
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, use_rslora=True).scale == 8.0


def test_a_model_that_cannot_have_them_is_refused_by_name() -> None:
    latent = shape(attention=LatentAttention(None, 8, 8, 8, 8))
    with pytest.raises(ConfigError, match="latent attention"):
        check_adapter(latent, LoraConfig(), MoeConfig())
    mixture = shape(experts=Experts(4, 2, 32, (True, True)))
    with pytest.raises(ConfigError, match=r"gate_proj, up_proj, down_proj.*\[q_proj, k_proj, v_proj, o_proj\]"):
        check_adapter(mixture, LoraConfig(), MoeConfig())
    attention = LoraConfig(targets=("q_proj", "o_proj"))
    check_adapter(mixture, attention, MoeConfig())
    with pytest.raises(ConfigError, match=r"moe\.bias_update_rate"):
        check_adapter(mixture, attention, MoeConfig(bias_update_rate=0.1))


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}])
def test_the_plan_counts_what_ranks_hold(layout: dict[str, int]) -> None:
    adapter, parallel = LoraConfig(rank=4), ParallelConfig(**layout)
    found = stage_adapters(shape(), parallel, adapter)
    cut = sum(t.shape[0] * t.shape[1] // (1 if t.cut.dim is None else parallel.tp) for t in adapter_tensors(shape(), adapter))
    assert [stage.total for stage in found] == [cut // parallel.pp] * parallel.pp


def written(directory: Path, **changes: Any) -> Path:
    values = {**peft_config(LoraConfig(rank=4, alpha=8.0), "base"), **changes}
    (directory / CONFIG_FILE).write_text(json.dumps(values))
    return directory


def test_what_we_write_is_what_we_read(tmp_path: Path) -> None:
    adapter = LoraConfig(rank=4, alpha=8.0)
    assert read_peft_config(written(tmp_path)) == adapter
    check_peft_config(tmp_path, adapter)
    names = {PREFIX + tensor.name for tensor in adapter_tensors(shape(), adapter)}
    check_peft_names(tmp_path, names, shape(), adapter)
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        check_peft_names(tmp_path, names - {min(names)}, shape(), adapter)
    with pytest.raises(ModelError, match="no place for 1 tensors, among them x"):
        check_peft_names(tmp_path, names | {"x"}, shape(), adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"q_proj": 4}),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("kasa_config", {"x": 1}),
        ("layers_to_transform", [0]),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "LOHA"),
        ("rank_pattern", {"q_proj": 4}),
        ("target_modules", "all-linear"),
        ("target_modules", ["q_proj", "gate"]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_dora", True),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match="targets" if value == ["q_proj", "gate"] else key):
        read_peft_config(written(tmp_path, **{key: value}))


@pytest.mark.parametrize("change", [{"r": 8}, {"lora_alpha": 4}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_another_adapter_than_the_configuration_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.adapter\."):
        check_peft_config(written(tmp_path, **change), LoraConfig(rank=4, alpha=8.0))
