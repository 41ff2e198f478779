"""What low-rank adapters keep from a layer's forward pass for its backward pass, beside what the layer keeps, in bytes.

Of each linear layer whose input x has adapters (mcore/model/lora.py): A of its projections as one matrix, A x, and with DoRA the
outputs before each is multiplied by its factor, the factors, and the lengths that these were divided by. x itself is what the
layer keeps anyhow. tests/dist/test_plan_numbers.py holds it against real layers, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ctpo_megatron.config.adapter import LoraConfig, Target
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.planning.work import FLOAT, Work


@dataclass(frozen=True, slots=True)
class _Linear:
    """One of megatron's linear layers on one rank, or as many of the same size as `copies` says."""

    tokens: int  # that A x is made of, and that the layer puts out; of all copies together
    inputs: int
    outputs: dict[Target, int]  # of each projection that it is made of
    copies: int = 1


def adapters_kept(shape: ModelShape, layer: int, adapter: LoraConfig, parallel: ParallelConfig, work: Work) -> int:
    """Returns the bytes that the adapters of layer number `layer` keep for one micro-batch on one rank."""
    return sum(_kept(linear, adapter, work.element) for linear in _linears(shape, layer, parallel, work))


def _kept(linear: _Linear, adapter: LoraConfig, element: int) -> int:
    adapted = [outputs for target, outputs in linear.outputs.items() if target in adapter.targets]
    if not adapted:
        return 0
    ranks = adapter.rank * len(adapted)
    kept = ranks * (linear.tokens + linear.copies * linear.inputs) * element
    if adapter.use_dora:
        whole = sum(linear.outputs.values())
        kept += linear.tokens * whole * element + (whole + sum(adapted)) * FLOAT
    return kept


def _linears(shape: ModelShape, layer: int, parallel: ParallelConfig, work: Work) -> Iterator[_Linear]:
    """Those of a layer. Where rows of the weight are cut all tokens of the rank meet, where columns are its share of them."""
    attention, hidden, tp, experts = shape.attention, shape.hidden_size, parallel.tp, shape.experts
    assert isinstance(attention, HeadAttention), "others have no adapters (models.adapters)"
    rows = -(-work.tokens // tp)
    queries, keys = shape.num_heads // tp * attention.head_dim, attention.num_kv_heads // tp * attention.head_dim
    yield _Linear(work.tokens, hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
    yield _Linear(rows, queries, {"o_proj": hidden})
    if experts is None or not experts.layers[layer]:
        width, here, copies = shape.ffn_hidden_size // tp, work.tokens, 1
        shared = rows
    else:
        width, copies = experts.ffn_hidden_size // parallel.etp, experts.count // parallel.ep
        here = shared = rows * experts.top_k * parallel.etp  # chosen evenly
    yield _Linear(here, hidden, {"gate_proj": width, "up_proj": width}, copies)
    yield _Linear(shared, width, {"down_proj": hidden}, copies)
