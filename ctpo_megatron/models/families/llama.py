"""Llama 3.x: grouped-query attention without biases, RoPE stretched by bands."""

from __future__ import annotations

from ctpo_megatron.models.families.family import Family, head_attention, model_shape
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import ModelShape


def _shape(keys: Keys) -> ModelShape:
    keys.must_be("attention_bias", False)  # in this family it would also be on the output projection
    return model_shape(keys, attention=head_attention(keys), rope=read_rope(keys))


LLAMA = Family(_shape, nulls={"head_dim": None, "num_key_value_heads": None})
