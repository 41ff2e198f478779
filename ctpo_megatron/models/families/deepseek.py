"""DeepSeek-V3 and its kin (R1, Kimi-K2, Moonlight): latent attention, sigmoid gates, shared experts.

Layers of multi-token prediction are not trained: loading passes over their tensors, exports lack them. The norms of the latents
use rms_norm_eps, as megatron and SGLang do; transformers has 1e-6 there, which is what V3 and R1 have for both. SGLang 0.5.23
does not serve this family on a CPU without AMX.
"""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, model_shape, mtp_layers, sigmoid_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import LatentAttention, ModelShape


def _shape(keys: Keys) -> ModelShape:
    keys.must_be("attention_bias", False, None)
    keys.must_be("rope_interleave", True, None)
    attention = LatentAttention(
        q_rank=keys.size("q_lora_rank") if keys.values.get("q_lora_rank") is not None else None,
        kv_rank=keys.size("kv_lora_rank"),
        nope_dim=keys.size("qk_nope_head_dim"),
        rope_dim=keys.size("qk_rope_head_dim"),
        value_dim=keys.size("v_head_dim"),
    )
    return model_shape(
        keys,
        attention=attention,
        rope=read_rope(keys, types=("default", "yarn")),
        experts=sigmoid_experts(keys),
        mtp_layers=mtp_layers(keys),
    )


DEEPSEEK_V3 = Family(_shape)
