"""The one table that says which Hugging Face tensors make up which Megatron parameter, and how tensor parallelism cuts them.

Loading and exporting both read it. A parameter is known here by its *key*: the name that megatron's portable layers give it,
with global layer and expert numbers. `parameter_key` translates what a rank sees, TransformerEngine's fused names included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ctpo_megatron.mcore.shape import ModelShape

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"

# TransformerEngine keeps a norm's weight in the linear layer behind it and groups the experts' matrices in one module
_FUSED_NAMES = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$"), ".input_layernorm.weight"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$"), ".pre_mlp_layernorm.weight"),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r".mlp.experts.local_experts.\2.\1.weight"),
)
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class Cut:
    """How the ranks of a tensor-parallel group share a parameter: each packs equal pieces of its Hugging Face tensors."""

    dim: int | None  # along which the tensors are cut; None: every rank holds them whole
    pack: Callable[[list[Tensor], ModelShape], Tensor]  # this rank's pieces -> its parameter
    unpack: Callable[[Tensor, ModelShape], list[Tensor]]  # its parameter -> its pieces


def _pack_qkv(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """q [G*m*d, ...], k and v [G*d, ...] -> [G*(m+2)*d, ...]: each group of m queries is followed by its key and value."""
    groups = parts[1].shape[0] // shape.attention.head_dim
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def _unpack_qkv(local: Tensor, shape: ModelShape) -> list[Tensor]:
    """Inverse of `_pack_qkv`."""
    dim = shape.attention.head_dim
    queries = shape.num_heads // shape.attention.num_kv_heads
    rows, rest = (queries + 2) * dim, local.shape[1:]
    pieces = local.reshape(-1, rows, *rest).split([queries * dim, dim, dim], dim=1)
    return [piece.reshape(-1, *rest) for piece in pieces]


def _pack_one(parts: list[Tensor], _shape: ModelShape) -> Tensor:
    return parts[0]


def _unpack_one(local: Tensor, _shape: ModelShape) -> list[Tensor]:
    return [local]


QKV = Cut(0, _pack_qkv, _unpack_qkv)
GATE_UP = Cut(0, lambda parts, _shape: torch.cat(parts), lambda local, _shape: list(local.chunk(2)))
COLUMN = Cut(0, _pack_one, _unpack_one)
ROW = Cut(1, _pack_one, _unpack_one)
WHOLE = Cut(None, _pack_one, _unpack_one)
WHOLE_GATE_UP = Cut(None, GATE_UP.pack, GATE_UP.unpack)  # of an expert: experts are not cut by tensor parallelism


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of the Hugging Face format and its place in Megatron's parameters."""

    name: str
    shape: tuple[int, ...]
    key: str  # parameter that holds it
    part: int  # which of that parameter's tensors it is
    cut: Cut
    layer: int | None = None  # counted from 0 over the whole model; None: outside the layers
    expert: int | None = None  # counted from 0 over the whole layer; None: not an expert's


def hf_tensors(shape: ModelShape) -> list[HfTensor]:
    """Every tensor of the model, in the order in which it is exported. Tied embeddings have no lm_head."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    tensors = [HfTensor("model.embed_tokens.weight", (vocab, hidden), EMBEDDING_KEY, 0, COLUMN)]
    for layer in range(shape.num_layers):
        tensors += _layer_tensors(shape, layer)
    tensors.append(HfTensor("model.norm.weight", (hidden,), "decoder.final_layernorm.weight", 0, WHOLE))
    if not shape.tie_embeddings:
        tensors.append(HfTensor("lm_head.weight", (vocab, hidden), OUTPUT_KEY, 0, COLUMN))
    return tensors


def parameter_key(name: str, first_layer: int, first_expert: int) -> str:
    """Key of the parameter that this rank's model calls `name`.

    `first_layer` and `first_expert` are the global numbers (from 0) of the rank's first layer and of its first expert.
    """
    for pattern, portable in _FUSED_NAMES:
        name = pattern.sub(portable, name)
    name = _LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda found: f".local_experts.{int(found[1]) + first_expert}.", name)


def _layer_tensors(shape: ModelShape, layer: int) -> list[HfTensor]:
    hidden, heads, kv_heads, dim = shape.hidden_size, shape.num_heads, shape.attention.num_kv_heads, shape.attention.head_dim
    tensors: list[HfTensor] = []

    def add(key: str, cut: Cut, *parts: tuple[str, tuple[int, ...]], expert: int | None = None) -> None:
        for part, (name, size) in enumerate(parts):
            full = (f"model.layers.{layer}.{name}", size, f"decoder.layers.{layer}.{key}")
            tensors.append(HfTensor(*full, part, cut, layer, expert))

    qkv_rows = (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim))
    add("input_layernorm.weight", WHOLE, ("input_layernorm.weight", (hidden,)))
    add("self_attention.linear_qkv.weight", QKV, *((f"self_attn.{x}_proj.weight", (rows, hidden)) for x, rows in qkv_rows))
    if shape.attention.qkv_bias:
        add("self_attention.linear_qkv.bias", QKV, *((f"self_attn.{x}_proj.bias", (rows,)) for x, rows in qkv_rows))
    if shape.attention.qk_norm:
        add("self_attention.q_layernorm.weight", WHOLE, ("self_attn.q_norm.weight", (dim,)))
        add("self_attention.k_layernorm.weight", WHOLE, ("self_attn.k_norm.weight", (dim,)))
    add("self_attention.linear_proj.weight", ROW, ("self_attn.o_proj.weight", (hidden, heads * dim)))
    add("pre_mlp_layernorm.weight", WHOLE, ("post_attention_layernorm.weight", (hidden,)))
    if layer not in shape.expert_layers:
        ffn = shape.ffn_hidden_size
        add("mlp.linear_fc1.weight", GATE_UP, *((f"mlp.{x}_proj.weight", (ffn, hidden)) for x in ("gate", "up")))
        add("mlp.linear_fc2.weight", ROW, ("mlp.down_proj.weight", (hidden, ffn)))
        return tensors
    ffn = shape.experts.ffn_hidden_size
    add("mlp.router.weight", WHOLE, ("mlp.gate.weight", (shape.num_experts, hidden)))
    for expert in range(shape.num_experts):
        key, name = f"mlp.experts.local_experts.{expert}", f"mlp.experts.{expert}"
        gate_up = ((f"{name}.{x}_proj.weight", (ffn, hidden)) for x in ("gate", "up"))
        add(f"{key}.linear_fc1.weight", WHOLE_GATE_UP, *gate_up, expert=expert)
        add(f"{key}.linear_fc2.weight", WHOLE, (f"{name}.down_proj.weight", (hidden, ffn)), expert=expert)
    return tensors
