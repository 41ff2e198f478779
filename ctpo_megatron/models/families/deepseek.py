"""DeepSeek-V3 and its kin with the same model_type (R1, Moonlight): latent attention, sigmoid gates, shared experts.

Kimi-K2 has this architecture under the model_type kimi_k2, which transformers does not know: refused.py says what to do.
Moonlight and Kimi-K2 are published with a tokenizer that only their own Python code can read (tiktoken.model), which is never run
here: docs/models.md says how to save it once as tokenizer.json.

Layers of multi-token prediction are not trained: loading passes over their tensors, exports lack them. The norms of the latents
use rms_norm_eps, as megatron and SGLang do; transformers has 1e-6 there, which is what V3 and R1 have for both. SGLang 0.5.23
does not serve this family on a CPU without AMX.
"""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, model_shape, mtp_layers, sigmoid_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import LatentAttention, ModelShape

SERVED_BY = ("moe_layer_freq", "scoring_func", "topk_method")  # published, and no part of transformers' class


def latent_attention(keys: Keys) -> LatentAttention:
    """Attention with one latent per token for all keys and values, as DeepSeek-V3 and its kin name its sizes."""
    keys.must_be("attention_bias", False)
    keys.must_be("rope_interleave", True)
    return LatentAttention(
        q_rank=None if keys.values.get("q_lora_rank", 0) is None else keys.size("q_lora_rank"),
        kv_rank=keys.size("kv_lora_rank"),
        nope_dim=keys.size("qk_nope_head_dim"),
        rope_dim=keys.size("qk_rope_head_dim"),
        value_dim=keys.size("v_head_dim"),
    )


def _shape(keys: Keys) -> ModelShape:
    return model_shape(
        keys,
        attention=latent_attention(keys),
        rope=read_rope(keys, types=("default", "yarn"), latent=True),
        experts=sigmoid_experts(keys),
        mtp_layers=mtp_layers(keys),
        served_by=SERVED_BY,
    )


DEEPSEEK_V3 = Family(
    _shape,
    defaults={
        "first_k_dense_replace": 3,
        "n_group": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_mtp_layers": 1,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    },
)
