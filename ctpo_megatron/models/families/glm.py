"""GLM-4.5 and 4.6 (glm4_moe): half of each head rotated, biases on queries, keys and values, DeepSeek-V3's mixture.

Layers of multi-token prediction are not trained: loading passes over their tensors, exports lack them.
"""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, head_attention, model_shape, mtp_layers, sigmoid_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import ModelShape


def _shape(keys: Keys) -> ModelShape:
    attention = head_attention(keys, qkv_bias=keys.get("attention_bias", bool), qk_norm=keys.get("use_qk_norm", bool))
    return model_shape(
        keys,
        attention=attention,
        rope=read_rope(keys, types=("default",), partial=True),
        experts=sigmoid_experts(keys),
        mtp_layers=mtp_layers(keys),
    )


GLM4_MOE = Family(
    _shape,
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
        "num_mtp_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    },
)
