"""Which tensors adapters are made of, which models cannot have them, and what of peft's files is taken or refused by name."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ctpo_megatron.config.adapter import TARGETS, LoraConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.errors import ConfigError, ModelError
from ctpo_megatron.models.adapters import adapted_tensors, adapter_tensors, check_adapter, target_names
from ctpo_megatron.models.peft import CONFIG_FILE, PREFIX, check_peft_config, check_peft_names, peft_config, read_peft_config
from ctpo_megatron.models.shape import Experts, HeadAttention, LatentAttention, ModelShape, Rope
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.planning.parameters import Parameters, stage_adapters


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


EXPERTS = 4


def mixture(family: str = "qwen3_moe", layers: tuple[bool, ...] = (True, True), **changes: Any) -> ModelShape:
    return shape(family=family, experts=Experts(EXPERTS, 2, 32, layers, **changes))


def test_every_projection_has_a_pair_that_multiplies_to_it_and_is_cut_as_it_is() -> None:
    pairs = adapted_tensors(shape(), LoraConfig(rank=3, use_dora=True))
    assert len(pairs) == 2 * len(TARGETS)
    for pair in pairs:
        assert pair.m is not None
        assert (pair.m.shape, pair.m.cut) == (pair.base.shape[:1], pair.b.cut)
        assert (pair.b.shape[0], pair.a.shape[1]) == pair.base.shape
        assert pair.a.shape[0] == pair.b.shape[1] == 3
        cuts = (pair.b.cut.dim, pair.a.cut.dim)
        assert cuts == ((None, 1) if pair.base.cut.dim == 1 else (0, None))
    keys = [tensor.key for tensor in adapter_tensors(shape(), LoraConfig(use_dora=True))]
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
    with pytest.raises(ConfigError, match=r"moe\.bias_update_rate"):
        check_adapter(mixture(), LoraConfig(targets=("q_proj", "o_proj")), MoeConfig(bias_update_rate=0.1))


@pytest.mark.parametrize(
    ("changes", "adapter", "refused"),
    [
        ({}, LoraConfig(), None),
        ({}, LoraConfig(targets=("q_proj", "down_proj")), None),
        ({}, LoraConfig(targets=("q_proj", "up_proj")), "gate_proj, up_proj and down_proj together"),
        ({}, LoraConfig(targets=("q_proj", "gate_proj", "up_proj")), "together, or down_proj alone; found gate_proj, up_proj"),
        ({}, LoraConfig(rank=16, alpha=32.0, use_rslora=True), r"use_rslora.* alpha to 128,"),
        ({}, LoraConfig(use_rslora=True, targets=("q_proj",)), None),
        ({}, LoraConfig(use_dora=True), "no DoRA of experts"),
        ({}, LoraConfig(use_dora=True, targets=("q_proj",)), None),
        ({"layers": (False, True)}, LoraConfig(), r"dense layers.*\[q_proj, k_proj, v_proj, o_proj\]"),
        ({"layers": (False, True)}, LoraConfig(targets=("q_proj", "o_proj")), None),
        ({"shared_ffn_hidden_size": 32}, LoraConfig(targets=("q_proj", "up_proj")), r"shared experts.*\[q_proj\]"),
    ],
)
def test_experts_have_what_peft_would_read_as_the_same(changes: dict[str, Any], adapter: LoraConfig, refused: str | None) -> None:
    with nullcontext() if refused is None else pytest.raises(ConfigError, match=refused):
        check_adapter(mixture(**changes), adapter, MoeConfig())


def test_every_expert_has_pairs_of_its_own_under_the_names_of_its_family() -> None:
    model = mixture(family="mixtral")
    adapter = LoraConfig(rank=3, targets=("q_proj", "gate_proj", "down_proj"))
    names = [tensor.name for tensor in adapter_tensors(model, adapter)]
    assert len(names) == 2 * 2 * (1 + 2 * EXPERTS)
    assert "model.layers.1.block_sparse_moe.experts.3.w1.lora_A.weight" in names
    assert target_names(model)["down_proj"] == "w2"
    experts = [each.a.expert for each in adapted_tensors(model, adapter) if each.target == "down_proj"]
    assert experts == 2 * list(range(EXPERTS))


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "etp": 2}, {"dp": 4, "ep": 2, "etp": 2}, {"pp": 2, "dp": 2, "ep": 2}]
)
@pytest.mark.parametrize("experts", [False, True])
def test_the_plan_counts_what_ranks_hold(layout: dict[str, int], experts: bool) -> None:
    adapter, parallel, model = LoraConfig(rank=4), ParallelConfig(**layout), mixture() if experts else shape()
    counts = {False: 0, True: 0}
    for t in adapter_tensors(model, adapter):
        ranks = parallel.tp if t.expert is None else parallel.etp
        counts[t.expert is not None] += t.shape[0] * t.shape[1] // (1 if t.cut.dim is None else ranks)
    found = stage_adapters(model, parallel, adapter)
    expected = Parameters(counts[False] // parallel.pp, counts[True] // parallel.pp // parallel.ep)
    assert found == [expected] * parallel.pp


def test_mixtures_are_written_and_read_by_their_own_names(tmp_path: Path) -> None:
    model, adapter = mixture(family="mixtral"), LoraConfig(rank=4, targets=("q_proj", "gate_proj", "up_proj", "down_proj"))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(peft_config(model, adapter, "base")))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == ["q_proj", "w1", "w3", "w2"]
    assert read_peft_config(tmp_path, model) == adapter
    (tmp_path / CONFIG_FILE).write_text(json.dumps(peft_config(model, adapter, "base") | {"target_modules": "all-linear"}))
    with pytest.raises(ModelError, match="routers"):
        read_peft_config(tmp_path, model)


def test_the_same_scale_in_other_words_is_the_same(tmp_path: Path) -> None:
    check_peft_config(written(tmp_path, use_rslora=True, lora_alpha=4.0), shape(), LoraConfig(rank=4, alpha=8.0))


def written(directory: Path, **changes: Any) -> Path:
    values = {**peft_config(shape(), LoraConfig(rank=4, alpha=8.0), "base"), **changes}
    (directory / CONFIG_FILE).write_text(json.dumps(values))
    return directory


def test_what_we_write_is_what_we_read(tmp_path: Path) -> None:
    adapter = LoraConfig(rank=4, alpha=8.0)
    assert read_peft_config(written(tmp_path), shape()) == adapter
    check_peft_config(tmp_path, shape(), adapter)
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
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match="targets" if value == ["q_proj", "gate"] else key):
        read_peft_config(written(tmp_path, **{key: value}), shape())


@pytest.mark.parametrize(
    "change", [{"r": 8}, {"lora_alpha": 4}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj"]}]
)
def test_another_adapter_than_the_configuration_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.adapter\."):
        check_peft_config(written(tmp_path, **change), shape(), LoraConfig(rank=4, alpha=8.0))
