"""How many parameters a model has, and how many of them each rank of a layout holds.

Ranks of one pipeline stage hold equally many, so the counts are per stage. Parameters are counted in two kinds, because their
optimizer states are shared out differently: those of experts over the expert-data-parallel group, all others over dp * cp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.models.adapters import adapter_tensors
from ctpo_megatron.models.rules import stage_layers
from ctpo_megatron.models.shape import HeadAttention, ModelShape


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters: of routed experts, and all others."""

    dense: int
    experts: int = 0

    @property
    def total(self) -> int:
        """Parameters of both kinds."""
        return self.dense + self.experts

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)


def stage_parameters(shape: ModelShape, parallel: ParallelConfig, *, value_head: bool = False) -> list[Parameters]:
    """What one rank of each pipeline stage holds; tensor-parallel padding of the vocabulary included, and a value head."""
    vocabulary = shape.padded_vocab_size(parallel.tp) // parallel.tp * shape.hidden_size
    found = []
    for stage, chunks in enumerate(stage_layers(shape, parallel)):
        held = Parameters(0)
        for layer in (number for chunk in chunks for number in chunk):
            held += layer_parameters(shape, layer, parallel.tp, parallel.ep, parallel.etp)
        is_first, is_last = stage == 0, stage == parallel.pp - 1
        # a tied output layer is the embedding itself on one stage, and a copy of it, kept equal, on the last of several
        matrices = is_first + (is_last and not (shape.tie_embeddings and is_first))
        norm_and_values = shape.hidden_size + (shape.hidden_size + 1 if value_head else 0)
        found.append(held + Parameters(vocabulary * matrices + (norm_and_values if is_last else 0)))
    return found


def stage_adapters(shape: ModelShape, parallel: ParallelConfig, adapter: LoraConfig) -> list[Parameters]:
    """What one rank of each pipeline stage holds of A and B."""
    by_layer: dict[int | None, Parameters] = {}
    for tensor in adapter_tensors(shape, adapter):
        numbers, cut = math.prod(tensor.shape), tensor.cut.dim is not None
        if tensor.expert is None:
            held = Parameters(numbers // parallel.tp if cut else numbers)
        elif tensor.expert < shape.num_experts // parallel.ep:  # those of any rank are as many as those of the first
            held = Parameters(0, numbers // parallel.etp if cut else numbers)
        else:
            continue
        by_layer[tensor.layer] = by_layer.get(tensor.layer, Parameters(0)) + held
    stages = stage_layers(shape, parallel)
    none = Parameters(0)
    return [sum((by_layer.get(number, none) for chunk in chunks for number in chunk), none) for chunks in stages]


def layer_parameters(shape: ModelShape, layer: int, tp: int = 1, ep: int = 1, etp: int = 1) -> Parameters:
    """What one rank holds of layer number `layer`."""
    hidden, experts = shape.hidden_size, shape.experts
    router = 0 if experts is None or not experts.layers[layer] else experts.count * hidden
    _, others = _attention(shape, tp)
    return layer_matrices(shape, layer, tp, ep, etp) + Parameters(2 * hidden + others + router)


def layer_matrices(shape: ModelShape, layer: int, tp: int = 1, ep: int = 1, etp: int = 1) -> Parameters:
    """Those of them that are in the matrices of linear layers: all but norms, biases and the router."""
    hidden, experts = shape.hidden_size, shape.experts
    attention, _ = _attention(shape, tp)
    if experts is None or not experts.layers[layer]:
        return Parameters(attention + 3 * hidden * shape.ffn_hidden_size // tp)
    shared = 3 * hidden * experts.shared_ffn_hidden_size // tp
    return Parameters(attention + shared, experts.count // ep * 3 * hidden * experts.ffn_hidden_size // etp)


def model_parameters(shape: ModelShape) -> Parameters:
    """The whole model."""
    return stage_parameters(shape, ParallelConfig())[0]


def active_parameters(shape: ModelShape) -> int:
    """What one token passes through: everything but the experts that were not chosen. The embedding counts."""
    whole = model_parameters(shape)
    share = shape.experts.top_k / shape.experts.count if shape.experts else 0
    return whole.dense + round(whole.experts * share)


def _attention(shape: ModelShape, tp: int) -> tuple[int, int]:
    """Matrices of one attention, and its biases and inner norms. What is not split over tensor parallelism counts whole."""
    hidden, heads, attention = shape.hidden_size, shape.num_heads, shape.attention
    if isinstance(attention, HeadAttention):
        outputs = (heads + 2 * attention.num_kv_heads) * attention.head_dim // tp
        norms = 2 * attention.head_dim if attention.qk_norm else 0
        return hidden * outputs + heads * attention.head_dim // tp * hidden, attention.qkv_bias * outputs + norms
    query = attention.nope_dim + attention.rope_dim
    down, up = hidden * (attention.kv_rank + attention.rope_dim), attention.kv_rank * (attention.nope_dim + attention.value_dim)
    norms = attention.kv_rank + (attention.q_rank or 0)
    if attention.q_rank is not None:
        down += hidden * attention.q_rank
    up += (hidden if attention.q_rank is None else attention.q_rank) * query
    return down + heads // tp * (up + attention.value_dim * hidden), norms
