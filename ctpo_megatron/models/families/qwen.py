"""Qwen2 and Qwen2.5 (biases on queries, keys and values), Qwen3 (norms on queries and keys), Qwen3-MoE."""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, head_attention, model_shape, softmax_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import Experts, ModelShape


def _qwen2(keys: Keys) -> ModelShape:
    return model_shape(keys, attention=head_attention(keys, qkv_bias=True), rope=read_rope(keys))


def _qwen3(keys: Keys) -> ModelShape:
    keys.must_be("attention_bias", False)
    return model_shape(keys, attention=head_attention(keys, qk_norm=True), rope=read_rope(keys))


def _qwen3_moe(keys: Keys) -> ModelShape:
    keys.must_be("attention_bias", False)
    return model_shape(keys, attention=head_attention(keys, qk_norm=True), rope=read_rope(keys), experts=_experts(keys))


def _experts(keys: Keys) -> Experts:
    step, dense = keys.size("decoder_sparse_step"), keys.get("mlp_only_layers", list)
    layers = range(keys.size("num_hidden_layers"))
    return softmax_experts(
        keys,
        count=keys.size("num_experts" if "num_experts" in keys.values else "num_local_experts"),  # transformers 4, 5
        ffn=keys.size("moe_intermediate_size"),
        layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in layers),
        normalise=keys.get("norm_topk_prob", bool),
    )


_KV_HEADS = {"num_key_value_heads": 32}  # where the key is absent; null: as many as heads
_SPARSE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
}

QWEN2 = Family(_qwen2, defaults=_KV_HEADS, nulls={"head_dim": None, "num_key_value_heads": None})
QWEN3 = Family(_qwen3, defaults=_KV_HEADS | {"head_dim": 128}, nulls={"num_key_value_heads": None})
QWEN3_MOE = Family(_qwen3_moe, defaults=_SPARSE, nulls={"mlp_only_layers": []})
