"""What decides a model's parameters and its forward pass, whichever family it is of. Needs neither torch nor megatron."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.types import RoutingShape


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of RoPE by bands of frequency."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): stretched by bands, attention scaled by mscale.

    With m(x) = 0.1 x ln(factor) + 1, what is rotated is multiplied by m(mscale) / m(mscale_all_dim). Latent attention also
    multiplies all logits by m(mscale_all_dim)^2.
    """

    factor: float  # more than 1
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding."""

    theta: float
    scaling: Llama3Scaling | YarnScaling | None = None
    fraction: float = 1.0  # of each head's dimensions that are rotated


@dataclass(frozen=True, slots=True)
class HeadAttention:
    """Attention whose heads have their own keys and values, or share them in groups (GQA)."""

    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (MLA, DeepSeek-V2): keys and values from one low-rank latent per token."""

    q_rank: int | None  # of the query's down-projection; None: queries are projected directly
    kv_rank: int
    nope_dim: int  # of each query and key head, without position
    rope_dim: int  # of each query head, and of the one key that all heads share, with position
    value_dim: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of some or all layers."""

    count: int
    top_k: int
    ffn_hidden_size: int
    layers: tuple[bool, ...]  # of the whole model: True where the MLP is a mixture
    shared_ffn_hidden_size: int = 0  # of the expert that sees every token; 0: there is none
    score: str = "softmax"  # softmax or sigmoid
    normalise: bool = False  # the chosen experts' gates are made to add up to 1
    scale: float = 1.0  # of the gates, after that
    groups: int = 1  # experts are chosen within the best `groups_kept` of so many groups
    groups_kept: int = 1
    bias: bool = False  # a bias per expert takes part in the choice, not in the gate (aux-loss-free balancing)
    aux_loss_coeff: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A supported model."""

    family: str  # model_type of its config.json
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the dense MLPs
    num_heads: int
    attention: HeadAttention | LatentAttention
    vocab_size: int  # rows of the embedding, as in config.json
    max_positions: int  # the longest sequence that the model and a server of it take
    rope: Rope
    rms_eps: float
    tie_embeddings: bool
    experts: Experts | None = None
    mtp_layers: int = 0  # of multi-token prediction, numbered after the model's own in its files: never loaded
    context_key: str = "max_position_embeddings"  # of config.json, which says `max_positions`
    unserved: tuple[str, ...] = ()  # keys that config.json lacks and SGLang does not start without
    dtype: str = "float32"  # number format of the stored weights, as config.json names it

    @property
    def num_experts(self) -> int:
        """Experts of a layer that has them; 0 in a dense model."""
        return self.experts.count if self.experts else 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers, from 0, of the layers with experts."""
        return tuple(i for i, is_mixture in enumerate(self.experts.layers) if is_mixture) if self.experts else ()

    @property
    def has_shared_expert(self) -> bool:
        """Whether layers have an expert that sees every token, besides the routed ones."""
        return self.experts is not None and self.experts.shared_ffn_hidden_size > 0

    @property
    def routing(self) -> RoutingShape | None:
        """What a record of the experts' choice looks like; None for a dense model."""
        if self.experts is None:
            return None
        return RoutingShape(self.num_layers, self.expert_layers, self.experts.count, self.experts.top_k)

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding that `tp` ranks share equally; rows from vocab_size on are zero and must be masked."""
        return -(-self.vocab_size // tp) * tp
