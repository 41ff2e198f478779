"""config.json files as they are published are accepted; what of them cannot be trained as it stands says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import HeadAttention, LatentAttention, Llama3Scaling, Rope, YarnScaling
from tests.unit.models.test_families import DEEPSEEK

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
QWEN25_7B = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
LLAMA31_8B = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.3",
    "vocab_size": 128256,
}
SMOLLM2 = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
MIXTRAL_8X7B = COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GLM45_AIR = COMMON | {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
MOONLIGHT = DEEPSEEK | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2 = MOONLIGHT | {  # moonshotai/Kimi-K2-Instruct without its quantization_config
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "routed_scaling_factor": 2.827,
}
GLM47_FLASH = COMMON | {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [154820, 154827, 154829],
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
MISTRAL_7B = COMMON | {  # v0.3
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}
MISTRAL_NEMO = MISTRAL_7B | {"head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 131072}
R1_DISTILL = QWEN25_7B | {"max_position_embeddings": 131072, "rope_theta": 10000, "sliding_window": 4096, "use_mrope": False}


@pytest.mark.parametrize(
    ("config", "attention", "rope", "positions"),
    [
        (QWEN25_7B, HeadAttention(4, 128, qkv_bias=True), Rope(1e6), 32768),
        (R1_DISTILL, HeadAttention(4, 128, qkv_bias=True), Rope(1e4), 131072),
        (QWEN3_8B, HeadAttention(8, 128, qk_norm=True), Rope(1e6), 40960),
        (QWEN3_30B, HeadAttention(4, 128, qk_norm=True), Rope(1e6), 40960),
        (LLAMA31_8B, HeadAttention(8, 128), Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)), 131072),
        (LLAMA31_8B | {"head_dim": None}, HeadAttention(8, 128), Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)), 131072),
        (SMOLLM2, HeadAttention(3, 64), Rope(1e5), 8192),
        (MIXTRAL_8X7B, HeadAttention(8, 128), Rope(1e6), 32768),
        (GLM45_AIR, HeadAttention(8, 128, qkv_bias=True), Rope(1e6, None, 0.5), 131072),
        (MOONLIGHT, LatentAttention(None, 512, 128, 64, 128), Rope(5e4), 8192),
        (GLM47_FLASH, LatentAttention(768, 512, 192, 64, 256), Rope(1e6), 202752),
        (MISTRAL_7B, HeadAttention(8, 128), Rope(1e6), 32768),
        (MISTRAL_NEMO, HeadAttention(8, 128), Rope(1e6), 32768),
    ],
    ids=[
        "qwen2.5",
        "r1-distill",
        "qwen3",
        "qwen3-moe",
        "llama3.1",
        "llama3.1-null",
        "smollm2",
        "mixtral",
        "glm-4.5-air",
        "moonlight",
        "glm-4.7-flash",
        "mistral-7b",
        "mistral-nemo",
    ],
)
def test_accepted_as_published(config: dict[str, Any], attention: Any, rope: Rope, positions: int) -> None:
    shape = parse_config(config)
    assert (shape.attention, shape.rope, shape.max_positions) == (attention, rope, positions)
    assert shape.dtype == "bfloat16"


@pytest.mark.parametrize(
    "config",
    [QWEN25_7B, QWEN3_8B, QWEN3_30B, LLAMA31_8B, SMOLLM2, MIXTRAL_8X7B, GLM45_AIR, MOONLIGHT, DEEPSEEK, MISTRAL_NEMO],
)
def test_saved_again_by_transformers_5_it_is_the_same_model(config: dict[str, Any]) -> None:
    from copy import deepcopy

    from transformers import CONFIG_MAPPING

    given = {key: value for key, value in deepcopy(config).items() if key != "model_type"}
    saved = CONFIG_MAPPING[config["model_type"]](**given).to_dict()
    assert parse_config(saved) == parse_config(config)


def test_kimi_k2_is_refused_by_its_name_and_taken_by_the_name_that_the_refusal_gives() -> None:
    with pytest.raises(ModelError, match=r'"model_type": "deepseek_v3" into config.json'):
        parse_config(KIMI_K2)
    shape = parse_config(KIMI_K2 | {"model_type": "deepseek_v3"})
    assert shape.attention == LatentAttention(1536, 512, 128, 64, 128)
    assert shape.rope == Rope(5e4, YarnScaling(32.0, 4096, 1.0, 1.0, mscale=1.0, mscale_all_dim=1.0))
    assert (shape.experts.count, shape.experts.top_k, shape.experts.groups, shape.experts.scale) == (384, 8, 1, 2.827)


def test_glm_4_7_flash_saved_again_by_transformers() -> None:
    """Which adds mlp_layer_types. SGLang reads first_k_dense_replace, and does not start without it."""
    layers = ["dense"] + ["sparse"] * 46
    assert parse_config(GLM47_FLASH | {"mlp_layer_types": layers}) == parse_config(GLM47_FLASH)
    for change in ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 45}, {"first_k_dense_replace": 2}):
        with pytest.raises(ModelError, match=r"mlp_layer_types.*first_k_dense_replace"):
            parse_config(GLM47_FLASH | change)
    with pytest.raises(ModelError, match="'first_k_dense_replace' is missing"):
        parse_config({key: value for key, value in GLM47_FLASH.items() if key != "first_k_dense_replace"})
    with pytest.raises(ModelError, match="head_dim is 256"):
        parse_config(GLM47_FLASH | {"head_dim": 256})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096, and max_position_embeddings is 32768"),
        ({"sliding_window": 32767}, "Set max_position_embeddings to 32767"),
        ({"sliding_window": 32768}, None),  # Ministral-8B-2410
        ({"sliding_window": 4096, "max_position_embeddings": 4096}, None),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"layer_types": ["full_attention"] * 32}, "layer_types"),
    ],
)
def test_windows_of_mistral(change: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert parse_config(MISTRAL_7B | change).attention == HeadAttention(8, 128)
        return
    with pytest.raises(ModelError) as caught:
        parse_config(MISTRAL_7B | change)
    assert words in str(caught.value)


def test_an_absent_window_of_mistral_is_the_classes() -> None:
    with pytest.raises(ModelError, match="sliding_window is 4096, which is what transformers takes where the key is absent"):
        parse_config({key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"})


@pytest.mark.parametrize("key", ["moe_layer_freq", "scoring_func", "topk_method"])
def test_what_sglang_does_not_start_without_is_noted(key: str) -> None:
    """transformers' class has no such keys, so files that others have saved may lack them; `ctpo train` refuses these."""
    assert parse_config(MOONLIGHT).unserved == ()
    assert parse_config({name: value for name, value in MOONLIGHT.items() if name != key}).unserved == (key,)
