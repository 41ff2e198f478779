"""GLM-4.7-Flash (glm4_moe_lite): DeepSeek-V3's latent attention and mixture, without scaling of RoPE.

transformers reads which layers are dense from `mlp_layer_types`, SGLang from `first_k_dense_replace`: both must say the same.
As in deepseek.py, the norms of the latents use rms_norm_eps and layers of multi-token prediction are not trained.
"""

from __future__ import annotations

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.families.deepseek import latent_attention
from ctpo_megatron.models.families.family import Family, model_shape, sigmoid_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import ModelShape

DENSE, SPARSE = "dense", "sparse"


def _shape(keys: Keys) -> ModelShape:
    _check_layers(keys)
    attention = latent_attention(keys)
    keys.size("num_key_value_heads")  # it plays no part, and a null cannot be read
    keys.must_be("head_dim", attention.rope_dim)  # another name of qk_rope_head_dim in transformers' class
    return model_shape(
        keys,
        attention=attention,
        rope=read_rope(keys, types=("default",), latent=True),
        experts=sigmoid_experts(keys),
        mtp_layers=keys.count("num_nextn_predict_layers", 0),
    )


def _check_layers(keys: Keys) -> None:
    layers, dense = keys.size("num_hidden_layers"), keys.count("first_k_dense_replace")
    served = [DENSE] * min(dense, layers) + [SPARSE] * (layers - dense)
    trained = keys.get("mlp_layer_types", list, [DENSE] + [SPARSE] * (layers - 1))
    if trained != served:
        raise ModelError(
            f"{keys.where}: by mlp_layer_types (absent: the first layer alone is dense) {trained.count(DENSE)} of {len(trained)} "
            f"layers are dense, by first_k_dense_replace the first {dense} of {layers}; transformers follows the former, SGLang "
            "the latter. Write the same in both."
        )


GLM4_MOE_LITE = Family(
    _shape,
    defaults={
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.8,
        "topk_group": 1,
    },
    nulls={"mlp_layer_types": None},
)
