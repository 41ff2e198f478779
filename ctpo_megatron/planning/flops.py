"""How the work of attention compares with the rest of a model."""

from __future__ import annotations

from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.planning.parameters import active_parameters


def attention_weight(shape: ModelShape) -> float:
    """w such that a sequence of L tokens costs as much as L + w L^2, in units of one token's linear layers.

    A token passes through each active matrix entry with one multiply-add. Causal attention takes, per layer and head,
    (key dimensions + value dimensions) * L^2 / 2 of them. 1 / w is the length at which both halves cost the same. The backward
    doubles both.
    """
    attention = shape.attention
    if isinstance(attention, HeadAttention):
        dimensions = 2 * attention.head_dim
    else:
        dimensions = attention.nope_dim + attention.rope_dim + attention.value_dim
    lookup = 0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size  # an embedding is looked up, not multiplied
    return shape.num_layers * shape.num_heads * dimensions / 2 / (active_parameters(shape) - lookup)
