"""The published configurations of each family, shortened, and what of them is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import Experts, HeadAttention, LatentAttention, Rope, YarnScaling

DEEPSEEK = {  # deepseek-ai/DeepSeek-V3 without its quantization_config
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GLM = {  # zai-org/GLM-4.5
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
MIXTRAL = {  # mistralai/Mixtral-8x7B-v0.1
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 301,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_deepseek_v3() -> None:
    shape = parse_config(DEEPSEEK)
    assert shape.attention == LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert shape.rope == Rope(10000.0, YarnScaling(40.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0))
    assert shape.experts == Experts(
        count=256,
        top_k=8,
        ffn_hidden_size=2048,
        layers=(False,) * 3 + (True,) * 58,
        shared_ffn_hidden_size=2048,
        score="sigmoid",
        normalise=True,
        scale=2.5,
        groups=8,
        groups_kept=4,
        bias=True,
        aux_loss_coeff=0.001,
    )
    assert (shape.mtp_layers, shape.dtype) == (1, "bfloat16")
    assert parse_config(DEEPSEEK | {"q_lora_rank": None}).attention.q_rank is None


def test_glm_4_5() -> None:
    shape = parse_config(GLM)
    assert shape.attention == HeadAttention(num_kv_heads=8, head_dim=128, qkv_bias=True, qk_norm=True)
    assert shape.rope == Rope(1000000.0, None, fraction=0.5)
    assert (shape.experts.count, shape.experts.top_k, shape.experts.groups, shape.experts.scale) == (160, 8, 1, 2.5)
    assert shape.expert_layers == tuple(range(3, 92))
    air = parse_config(GLM | {"use_qk_norm": False, "attention_bias": False})
    assert air.attention == HeadAttention(num_kv_heads=8, head_dim=128)
    fifth = {key: value for key, value in GLM.items() if key not in ("partial_rotary_factor", "rope_scaling", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5}
    assert parse_config(fifth | {"rope_parameters": rope}).rope == shape.rope


def test_mixtral() -> None:
    shape = parse_config(MIXTRAL)
    assert shape.attention == HeadAttention(num_kv_heads=8, head_dim=128)
    assert shape.experts == Experts(8, 2, 14336, layers=(True,) * 32, normalise=True, aux_loss_coeff=0.02)


def test_some_layers_of_qwen3_moe_may_be_dense() -> None:
    moe = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    assert parse_config(QWEN3 | moe | {"mlp_only_layers": [1]}).expert_layers == (0, 2, 3)
    assert parse_config(QWEN3 | moe | {"decoder_sparse_step": 2}).expert_layers == (1, 3)


def attention_factor(scaling: YarnScaling) -> float:
    def m(x: float) -> float:
        return 0.1 * x * math.log(scaling.factor) + 1.0

    return m(scaling.mscale) / m(scaling.mscale_all_dim)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 0.1 * math.log(4.0) + 1.0),
        ({"mscale": 2.0}, 0.1 * math.log(4.0) + 1.0),  # one alone does not count
        ({"mscale_all_dim": 2.0}, 0.1 * math.log(4.0) + 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 2.0}, 1.0),
        ({"attention_factor": 0.9, "attn_factor": 0.9 / (0.1 * math.log(4.0) + 1.0)}, 0.9),
        ({"attention_factor": 0.9, "attn_factor": 0.9 / (0.1 * math.log(4.0) + 1.0), "mscale_all_dim": 2.0}, 0.9),
    ],
)
def test_the_factor_of_yarn(change: dict[str, float], factor: float) -> None:
    rope = parse_config(QWEN3 | {"rope_scaling": YARN | change}).rope
    assert attention_factor(rope.scaling) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DEEPSEEK | {"quantization_config": {"quant_method": "fp8"}}, ["quantised (fp8)", "Convert the checkpoint to bfloat16"]),
        (DEEPSEEK | {"norm_topk_prob": False}, ["norm_topk_prob is False"]),
        (DEEPSEEK | {"rope_interleave": False}, ["rope_interleave is False"]),
        (DEEPSEEK | {"rope_interleave": None}, ["rope_interleave is None"]),
        (DEEPSEEK | {"topk_group": 2}, ["2 * topk_group", "8 and 2"]),
        (DEEPSEEK | {"n_group": 7}, ["256 experts", "n_group = 7"]),
        (DEEPSEEK | {"scoring_func": "softmax"}, ["scoring_func is 'softmax'"]),
        (DEEPSEEK | {"rope_scaling": {"type": "llama3"}}, ["'llama3' is not supported", "default, yarn"]),
        (GLM | {"rope_scaling": YARN}, ["'yarn' is not supported"]),
        (MIXTRAL | {"sliding_window": 4096}, ["sliding_window is 4096"]),
        (QWEN3 | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        (QWEN3 | {"rope_scaling": YARN | {"factor": 1.0}}, ["factor is 1.0", "more than 1"]),
        (QWEN3 | {"rope_scaling": YARN | {"truncate": False}}, ["truncate is False"]),
    ],
)
def test_what_is_refused(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(config)
    for word in words:
        assert word in str(caught.value)
