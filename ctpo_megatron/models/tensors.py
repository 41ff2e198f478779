"""The one table that says which Hugging Face tensors make up which Megatron parameter, and how tensor parallelism cuts them.

Loading and exporting both read it. A parameter is known here by its *key*: the name that megatron's portable layers give it,
with global layer and expert numbers. `parameter_key` translates what a rank sees, TransformerEngine's fused names included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctpo_megatron.models.families import FAMILIES
from ctpo_megatron.models.shape import HeadAttention, LatentAttention, ModelShape

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"
VALUE_HEAD = "value_head"  # of a critic: under this name a model has parameters that no Hugging Face model has
EXPERT_BIAS = "router.expert_bias"  # a buffer of megatron's router; all other keys are parameters
DENSE_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# TransformerEngine keeps a norm's weight in the linear layer behind it and groups the experts' matrices in one module
_FUSED_NAMES = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$"), ".input_layernorm.weight"),
    (re.compile(r"\.self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$"), r".self_attention.\1_layernorm.weight"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$"), ".pre_mlp_layernorm.weight"),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r".mlp.experts.local_experts.\2.\1.weight"),
)
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Cut:
    """How the ranks of a tensor-parallel group share a parameter: each holds equal pieces of its Hugging Face tensors, joined.

    The group is that of tensor parallelism, or for an expert's parameters that of expert tensor parallelism. `mcore.hf.cuts`
    joins pieces and takes parameters apart.
    """

    dim: int | None  # along which the tensors are cut; None: every rank holds them whole
    join: Literal["alone", "stacked", "grouped"] = "alone"


QKV = Cut(0, "grouped")  # each group of queries is followed by its key and its value
GATE_UP = Cut(0, "stacked")  # the gate's rows, then the up-projection's
COLUMN = Cut(0)
ROW = Cut(1)
WHOLE = Cut(None)


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
    precise: bool = False  # float32 whatever the model's number format


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


def parameter_key(name: str, layers: Sequence[int], first_expert: int) -> str:
    """Key of the parameter that this rank's model calls `name`.

    `layers` are the global numbers (from 0) of the model's layers, in its order; `first_expert` is that of its first expert.
    """
    for pattern, portable in _FUSED_NAMES:
        name = pattern.sub(portable, name)
    name = _LAYER.sub(lambda found: f"decoder.layers.{layers[int(found[1])]}.", name)
    return _EXPERT.sub(lambda found: f".local_experts.{int(found[1]) + first_expert}.", name)


class _Layer:
    """The tensors of one layer, as they are added."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.tensors: list[HfTensor] = []

    def add(
        self, key: str, cut: Cut, *parts: tuple[str, tuple[int, ...]], expert: int | None = None, precise: bool = False
    ) -> None:
        """A parameter and the tensors, name and shape, that make it up."""
        for part, (name, size) in enumerate(parts):
            full = (f"model.layers.{self.layer}.{name}", size, f"decoder.layers.{self.layer}.{key}")
            self.tensors.append(HfTensor(*full, part, cut, self.layer, expert, precise))

    def add_mlp(
        self, key: str, name: str, hidden: int, ffn: int, projections: tuple[str, str, str], expert: int | None = None
    ) -> None:
        """A gated MLP; `projections` are the names of gate, up and down."""
        *gate_up, down = projections
        self.add(f"{key}.linear_fc1.weight", GATE_UP, *((f"{name}.{x}.weight", (ffn, hidden)) for x in gate_up), expert=expert)
        self.add(f"{key}.linear_fc2.weight", ROW, (f"{name}.{down}.weight", (hidden, ffn)), expert=expert)


def _layer_tensors(shape: ModelShape, number: int) -> list[HfTensor]:
    layer, hidden = _Layer(number), shape.hidden_size
    layer.add("input_layernorm.weight", WHOLE, ("input_layernorm.weight", (hidden,)))
    if isinstance(shape.attention, LatentAttention):
        _add_latent_attention(layer, shape, shape.attention)
    else:
        _add_head_attention(layer, shape, shape.attention)
    layer.add("pre_mlp_layernorm.weight", WHOLE, ("post_attention_layernorm.weight", (hidden,)))
    if number in shape.expert_layers:
        _add_mixture(layer, shape)
    else:
        layer.add_mlp("mlp", "mlp", hidden, shape.ffn_hidden_size, DENSE_PROJECTIONS)
    return layer.tensors


def _add_head_attention(layer: _Layer, shape: ModelShape, attention: HeadAttention) -> None:
    hidden, dim = shape.hidden_size, attention.head_dim
    heads, groups = shape.num_heads * dim, attention.num_kv_heads * dim
    rows = (("q", heads), ("k", groups), ("v", groups))
    layer.add("self_attention.linear_qkv.weight", QKV, *((f"self_attn.{x}_proj.weight", (n, hidden)) for x, n in rows))
    if attention.qkv_bias:
        layer.add("self_attention.linear_qkv.bias", QKV, *((f"self_attn.{x}_proj.bias", (n,)) for x, n in rows))
    if attention.qk_norm:
        layer.add("self_attention.q_layernorm.weight", WHOLE, ("self_attn.q_norm.weight", (dim,)))
        layer.add("self_attention.k_layernorm.weight", WHOLE, ("self_attn.k_norm.weight", (dim,)))
    layer.add("self_attention.linear_proj.weight", ROW, ("self_attn.o_proj.weight", (hidden, heads)))


def _add_latent_attention(layer: _Layer, shape: ModelShape, attention: LatentAttention) -> None:
    """Rows of the up-projections are head after head on both sides; the down-projections are small and on every rank."""
    hidden, heads, latent = shape.hidden_size, shape.num_heads, attention.kv_rank
    queries = heads * (attention.nope_dim + attention.rope_dim)

    def add(key: str, cut: Cut, name: str, *size: int) -> None:
        layer.add(f"self_attention.{key}.weight", cut, (f"self_attn.{name}.weight", size))

    if attention.q_rank is None:
        add("linear_q_proj", COLUMN, "q_proj", queries, hidden)
    else:
        add("linear_q_down_proj", WHOLE, "q_a_proj", attention.q_rank, hidden)
        add("q_layernorm", WHOLE, "q_a_layernorm", attention.q_rank)
        add("linear_q_up_proj", COLUMN, "q_b_proj", queries, attention.q_rank)
    add("linear_kv_down_proj", WHOLE, "kv_a_proj_with_mqa", latent + attention.rope_dim, hidden)
    add("kv_layernorm", WHOLE, "kv_a_layernorm", latent)
    add("linear_kv_up_proj", COLUMN, "kv_b_proj", heads * (attention.nope_dim + attention.value_dim), latent)
    add("linear_proj", ROW, "o_proj", hidden, heads * attention.value_dim)


def _add_mixture(layer: _Layer, shape: ModelShape) -> None:
    names, experts, hidden = FAMILIES[shape.family].mixture, shape.experts, shape.hidden_size
    if experts is None:
        raise ValueError(f"layer {layer.layer} has a mixture of experts, but the model's shape has none")
    layer.add("mlp.router.weight", WHOLE, (f"{names.block}.gate.weight", (experts.count, hidden)))
    if experts.bias:
        bias = (f"{names.block}.gate.e_score_correction_bias", (experts.count,))
        layer.add(f"mlp.{EXPERT_BIAS}", WHOLE, bias, precise=True)
    projections = (names.gate, names.up, names.down)
    for expert in range(experts.count):
        key, name = f"mlp.experts.local_experts.{expert}", f"{names.block}.experts.{expert}"
        layer.add_mlp(key, name, hidden, experts.ffn_hidden_size, projections, expert)
    if experts.shared_ffn_hidden_size:
        layer.add_mlp("mlp.shared_experts", "mlp.shared_experts", hidden, experts.shared_ffn_hidden_size, DENSE_PROJECTIONS)
