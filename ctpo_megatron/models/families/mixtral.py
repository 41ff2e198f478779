"""Mixtral: Llama's attention, and a mixture in every layer whose gates are a softmax over the chosen experts."""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, MixtureNames, head_attention, model_shape, softmax_experts
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import ModelShape


def _shape(keys: Keys) -> ModelShape:
    keys.must_be("sliding_window", None)
    keys.must_be("router_jitter_noise", 0.0, None)
    experts = softmax_experts(
        keys,
        count=keys.size("num_local_experts"),
        ffn=keys.size("intermediate_size"),
        layers=(True,) * keys.size("num_hidden_layers"),
        normalise=True,
    )
    rope = read_rope(keys, theta=1_000_000.0)
    return model_shape(keys, attention=head_attention(keys), rope=rope, experts=experts, rms_eps=1e-5)


MIXTRAL = Family(_shape, MixtureNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"))
