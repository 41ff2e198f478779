"""What absent keys and nulls of a config.json stand for: the same as in transformers' class, for every key and every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.families import FAMILIES
from ctpo_megatron.models.shape import ModelShape

PLAIN: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 4096,
    "intermediate_size": 96,
    "num_attention_heads": 128,
    "num_key_value_heads": 64,
    "head_dim": 48,
    "vocab_size": 301,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 3e-5,
    "rope_theta": 777.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
}
SIGMOID: dict[str, Any] = {
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 64,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 2,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.25,
    "num_nextn_predict_layers": 3,
}
SOFTMAX = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "router_aux_loss_coef": 0.25}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": SOFTMAX | {"norm_topk_prob": True, "mlp_only_layers": [1], "decoder_sparse_step": 2},
    "mixtral": {"num_local_experts": 16, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.25, "head_dim": 32},
    "deepseek_v3": SIGMOID
    | {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
    | {"rope_interleave": True},
    "glm4_moe_lite": SIGMOID
    | {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
    | {"rope_interleave": True, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4, "head_dim": 8},
    "mistral": {},
    "glm4_moe": SIGMOID | {"use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.25},
}
BASES = {family: PLAIN | {"model_type": family} | own for family, own in OF_FAMILY.items()}


def by_class(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same model with every key written out by transformers' class; None where that cannot read it."""
    given = {key: value for key, value in config.items() if key != "model_type"}
    try:
        return CONFIG_MAPPING[config["model_type"]](**given).to_dict()
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError):
        return None


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    try:
        return parse_config(config)
    except ModelError:
        return None


def changes(base: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "nothing", dict(base)
    for key in base.keys() - {"model_type"}:
        yield f"{key} absent", {name: value for name, value in base.items() if name != key}
        yield f"{key} null", base | {key: None}


def test_every_family_is_here() -> None:
    assert BASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_and_nulls_are_read_as_by_the_class(family: str) -> None:
    """Where the class reads the file we read the same or refuse; what it cannot read is refused, as no server would start."""
    read = set()
    for what, config in changes(BASES[family]):
        ours, written_out = shape_of(config), by_class(config)
        if ours is None:
            continue
        read.add(what)
        assert written_out is not None, f"{what}: transformers cannot read this, but it was accepted"
        assert shape_of(written_out) == ours, what
    # by the class these have defaults that make a sound model of the base
    optional = {"tie_word_embeddings", "rope_scaling", "rope_theta", "rms_norm_eps", "partial_rotary_factor", "hidden_act"}
    assert {"nothing", *(f"{key} absent" for key in optional)} <= read


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_of_defaults_are_the_classes(family: str) -> None:
    """Entry by entry, so that none of a key which the walk above does not reach is wrong."""
    instance = CONFIG_MAPPING[family]()
    rope = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    for key, value in FAMILIES[family].defaults.items():
        found = instance.rope_parameters[rope[key]] if key in rope else getattr(instance, key)
        assert found == value, key


@pytest.mark.parametrize(
    ("family", "absent", "read"),
    [
        ("deepseek_v3", ("n_group", "topk_group", "n_routed_experts"), None),
        ("deepseek_v3", ("n_shared_experts", "routed_scaling_factor"), (64, 2.5)),
        ("glm4_moe", ("n_shared_experts", "routed_scaling_factor"), (64, 1.0)),
    ],
)
def test_what_sigmoid_mixtures_are_without_their_keys(family: str, absent: tuple[str, ...], read: Any) -> None:
    shape = shape_of({key: value for key, value in BASES[family].items() if key not in absent})
    found = None if shape is None or shape.experts is None else (shape.experts.shared_ffn_hidden_size, shape.experts.scale)
    assert found == read
