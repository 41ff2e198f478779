"""What one layer keeps from its forward pass for its backward pass, and the head's working memory, in bytes.

After Korthikanti et al., arXiv 2205.05198, sections 4.1 and 4.2, for the layers that are trained here: RMSNorm, SwiGLU, grouped
or latent attention, mixtures of experts, no dropout, no biases, sequence parallelism wherever tp > 1. With TransformerEngine:
attention is flash attention (queries, keys, values, output and one float32 per head and token are kept, no scores), each norm
keeps its input and its output, rotation and activation are fused. Experts are assumed to be chosen evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.models.shape import Experts, HeadAttention, ModelShape
from ctpo_megatron.planning.adapted import adapters_kept
from ctpo_megatron.planning.work import FLOAT, Work

BLOCK, FEWEST_WORDS = 2**23, 128  # of parallel.words, which needs torch; a test holds them equal


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one layer for one micro-batch on one rank."""

    input: int  # the layer's own input: all that full recomputation keeps
    norms: int  # the normed inputs of attention and MLP, and the MLP's input before its norm
    attention: int
    mlp: int
    adapters: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return self.input + self.norms + self.attention + self.mlp + self.adapters


def layer_kept(shape: ModelShape, layer: int, parallel: ParallelConfig, work: Work, adapter: LoraConfig | None = None) -> Kept:
    """What layer number `layer` keeps with recompute `none` or `selective`."""
    rows = -(-work.tokens // parallel.tp)  # sequence parallelism
    stream = rows * shape.hidden_size * work.element
    experts, again = shape.experts, work.recompute == "selective"
    # norms are recomputed in models with experts only (mcore/model/transformer.py)
    norms = stream if again and experts is not None else 3 * stream
    if experts is not None and experts.layers[layer]:
        mlp = _mixture(experts, shape.hidden_size, parallel, work, rows)
    else:
        mlp = 3 * shape.ffn_hidden_size // parallel.tp * work.tokens * work.element
    beside = 0 if adapter is None else adapters_kept(shape, layer, adapter, parallel, work)
    return Kept(stream, norms, _attention(shape, parallel.tp, work, rows), mlp, beside)


def head_working(shape: ModelShape, tp: int, work: Work) -> int:
    """The most that final norm, output matrix and log-probs hold at once, without any full logits (see `parallel.vocab`)."""
    hidden = work.tokens * shape.hidden_size
    norm = 2 * -(-work.tokens // tp) * shape.hidden_size * work.element
    words = shape.padded_vocab_size(tp) // tp
    block = work.tokens * min(words, max(FEWEST_WORDS, BLOCK // max(work.tokens, 1)))
    # gathered hidden states, the same scaled, a block's part of their gradient; the gradient in float32
    streams = hidden * (3 * work.element + FLOAT)
    # the block that the forward has kept, and one that is computed again; both also in the model's number format
    return norm + streams + words * shape.hidden_size * work.element + 2 * block * (work.element + FLOAT)


def value_working(shape: ModelShape, work: Work) -> int:
    """What a value head keeps, hidden states in float32, and their gradient, which is made the model's number format."""
    return work.tokens * shape.hidden_size * (2 * FLOAT + work.element)


def replay_bytes(shape: ModelShape, layers: int, tp: int, work: Work) -> int:
    """Routing replay: the engine's choices for one micro-batch that the routers of `layers` layers on this rank see."""
    routing = shape.routing
    return -(-work.tokens // tp) * layers * routing.top_k * routing.dtype.itemsize if routing else 0


def _attention(shape: ModelShape, tp: int, work: Work, rows: int) -> int:
    attention, heads = shape.attention, shape.num_heads // tp
    sums = heads * work.tokens * FLOAT
    if isinstance(attention, HeadAttention):
        groups = attention.num_kv_heads // tp
        # the projection's output (it holds the values), queries and keys after norm and rotation, the attention's output
        width = (heads + 2 * groups) + (heads + groups) + heads
        again = heads * attention.head_dim * work.tokens if work.attention_again else 0
        return width * attention.head_dim * work.tokens * work.element + sums + again
    query, value = attention.nope_dim + attention.rope_dim, attention.value_dim
    # latents of queries and of keys and values, each before and after its norm
    latents = 2 * (attention.q_rank or 0) + 2 * attention.kv_rank + attention.rope_dim
    # both up-projections' outputs, rotated queries and whole keys, values; recomputed from the latents with `selective`
    up = 0 if work.recompute == "selective" else 3 * query + (attention.nope_dim + value) + value
    again = heads * value * work.tokens if work.attention_again else 0
    return (latents * rows + heads * (up + value) * work.tokens) * work.element + sums + again


def _mixture(experts: Experts, hidden: int, parallel: ParallelConfig, work: Work, rows: int) -> int:
    scores = 2 * experts.count * rows * FLOAT  # the router's logits and probabilities
    shared = 3 * experts.shared_ffn_hidden_size // parallel.tp * work.tokens * work.element
    chosen = rows * experts.top_k * parallel.etp  # tokens that reach this rank's experts, chosen evenly
    activations = 2 if work.recompute == "selective" else 3  # gate and up, and their product
    width = hidden + activations * experts.ffn_hidden_size // parallel.etp
    return scores + shared + chosen * width * work.element
