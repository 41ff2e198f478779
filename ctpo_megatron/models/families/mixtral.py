"""Mixtral: Llama's attention, and a mixture in every layer whose gates are a softmax over the chosen experts."""

from __future__ import annotations

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.families.family import Family, MixtureNames, head_attention, model_shape, softmax_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import HeadAttention, ModelShape, Rope


def _shape(keys: Keys) -> ModelShape:
    keys.must_be("sliding_window", None)
    keys.must_be("router_jitter_noise", 0.0)
    experts = softmax_experts(
        keys,
        count=keys.size("num_local_experts" if "num_local_experts" in keys.values else "num_experts"),
        ffn=keys.size("intermediate_size"),
        layers=(True,) * keys.size("num_hidden_layers"),
        normalise=True,
    )
    return model_shape(keys, attention=_attention(keys), rope=_rope(keys), experts=experts)


def _attention(keys: Keys) -> HeadAttention:
    attention, width = head_attention(keys), keys.size("hidden_size") // keys.size("num_attention_heads")
    if attention.head_dim != width:  # SGLang passes over head_dim in this family
        raise ModelError(f"{keys.where}: head_dim is {attention.head_dim}; SGLang takes hidden / heads = {width} for Mixtral.")
    return attention


def _rope(keys: Keys) -> Rope:
    rope = read_rope(keys, types=("default",))  # SGLang passes over any other in this family
    if rope.theta != int(rope.theta):
        raise ModelError(f"{keys.where}: rope_theta is {rope.theta}; SGLang serves Mixtral with whole numbers only.")
    return rope


MIXTRAL = Family(
    _shape,
    MixtureNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.001},
    nulls={"head_dim": None},
)
