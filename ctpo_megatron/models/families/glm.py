"""GLM-4.5 and 4.6 (glm4_moe): half of each head rotated, biases on queries, keys and values, DeepSeek-V3's mixture.

Layers of multi-token prediction are not trained: loading passes over their tensors, exports lack them.
"""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, head_attention, model_shape, mtp_layers, sigmoid_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import ModelShape


def _shape(keys: Keys) -> ModelShape:
    attention = head_attention(
        keys, qkv_bias=keys.get("attention_bias", bool, False), qk_norm=keys.get("use_qk_norm", bool, False)
    )
    return model_shape(
        keys,
        attention=attention,
        rope=read_rope(keys, fraction=0.5, types=("default",)),
        experts=sigmoid_experts(keys),
        rms_eps=1e-5,
        mtp_layers=mtp_layers(keys),
    )


GLM4_MOE = Family(_shape)
