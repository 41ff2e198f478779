"""What a family is: how its config.json becomes a ModelShape, and what its tensors are called where families differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.shape import Experts, HeadAttention, LatentAttention, ModelShape, Rope

CONTEXT = "max_position_embeddings"
SERVED_CONTEXT = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", CONTEXT)  # in SGLang's order


@dataclass(frozen=True, slots=True)
class MixtureNames:
    """Names of a mixture's tensors: model.layers.N.{block}.experts.E.{gate}.weight and so on; the router is {block}.gate."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


COMMON_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
COMMON_NULLS: Mapping[str, Any] = {"partial_rotary_factor": 1.0}


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`. `shape` raises ModelError for what this package cannot train.

    `defaults` and `nulls`: what absent keys and nulls stand for in transformers' class (version 5.19), besides the common ones;
    where a null's meaning depends on other keys it is None here, and `shape` knows it. tests/unit/models/test_defaults.py holds
    both against the class.
    """

    shape: Callable[[Keys], ModelShape]
    mixture: MixtureNames = MixtureNames()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    nulls: Mapping[str, Any] = field(default_factory=dict)

    def keys(self, values: Mapping[str, Any], where: str) -> Keys:
        """Typed access to a config.json of this family."""
        nulls = {key: value for key, value in COMMON_NULLS.items() if key not in self.defaults}
        return Keys(values, where, {**COMMON_DEFAULTS, **self.defaults}, nulls | {**self.nulls})


def model_shape(
    keys: Keys,
    *,
    attention: HeadAttention | LatentAttention,
    rope: Rope,
    experts: Experts | None = None,
    mtp_layers: int = 0,
    served_by: Sequence[str] = (),
) -> ModelShape:
    """The shape, with what every family calls by the same keys. `served_by`: keys that SGLang does not start without."""
    keys.must_be("hidden_act", "silu")
    keys.must_be("mlp_bias", False)
    context_key, positions = read_context(keys)
    return ModelShape(
        family=keys.get("model_type", str),
        num_layers=keys.size("num_hidden_layers"),
        hidden_size=keys.size("hidden_size"),
        ffn_hidden_size=keys.size("intermediate_size"),
        num_heads=keys.size("num_attention_heads"),
        attention=attention,
        vocab_size=keys.size("vocab_size"),
        max_positions=positions,
        context_key=context_key,
        rope=rope,
        rms_eps=keys.get("rms_norm_eps", float),
        tie_embeddings=keys.get("tie_word_embeddings", bool),
        experts=experts,
        mtp_layers=mtp_layers,
        unserved=tuple(key for key in served_by if key not in keys.values),
        dtype=str(keys.values.get("dtype") or keys.values.get("torch_dtype") or "float32"),
    )


def read_context(keys: Keys) -> tuple[str, int]:
    """The longest sequence that the model and a server of it take, and the key of config.json that says so.

    SGLang takes the first of `SERVED_CONTEXT` that there is for the context, whatever `max_position_embeddings` says.
    """
    served = next((key for key in SERVED_CONTEXT if keys.values.get(key) is not None), CONTEXT)
    return min(((key, keys.size(key)) for key in (CONTEXT, served)), key=lambda found: found[1])


def head_attention(keys: Keys, *, qkv_bias: bool = False, qk_norm: bool = False) -> HeadAttention:
    """Attention with a key and a value per group of heads. The width of a head is hidden / heads where nothing says it."""
    keys.must_be("use_sliding_window", False)
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"{keys.where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
            + ("." if "num_key_value_heads" in keys.values else ", which is what transformers takes where the key is absent.")
        )
    head_dim = keys.size("head_dim", max(1, hidden // heads))
    return HeadAttention(num_kv_heads=kv_heads, head_dim=head_dim, qkv_bias=qkv_bias, qk_norm=qk_norm)


def softmax_experts(keys: Keys, *, count: int, ffn: int, layers: tuple[bool, ...], normalise: bool) -> Experts:
    """A mixture whose gates are a softmax over experts (Qwen, Mixtral)."""
    return Experts(
        count=count,
        top_k=_top_k(keys, count),
        ffn_hidden_size=ffn,
        layers=layers,
        normalise=normalise,
        aux_loss_coeff=keys.get("router_aux_loss_coef", float),
    )


def sigmoid_experts(keys: Keys) -> Experts:
    """A mixture as DeepSeek-V3 has it: sigmoid gates, choice within groups and with a bias, shared experts, dense layers first.

    `aux_loss_alpha`, where there is one, is the coefficient of a load-balancing loss over sequences; here that loss is over
    micro-batches.
    """
    count = keys.size("n_routed_experts" if "n_routed_experts" in keys.values else "num_local_experts")
    top_k, groups, kept = _top_k(keys, count), keys.size("n_group"), keys.size("topk_group")
    keys.must_be("scoring_func", "sigmoid")
    keys.must_be("topk_method", "noaux_tc")
    keys.must_be("moe_layer_freq", 1)
    if top_k > 1:
        keys.must_be("norm_topk_prob", True)  # megatron always makes gates of sigmoids add up to 1
    if count % groups or kept > groups or top_k > kept * (count // groups):
        raise ModelError(
            f"{keys.where}: {top_k} of {count} experts cannot be chosen from topk_group = {kept} of n_group = {groups} groups."
        )
    if kept < groups and (top_k // kept != 2 or count // groups < 2):  # megatron sums top_k // kept, all others sum 2
        raise ModelError(
            f"{keys.where}: groups are ranked by their two best experts, which megatron does where num_experts_per_tok is "
            f"2 * topk_group; they are {top_k} and {kept}."
        )
    ffn, dense = keys.size("moe_intermediate_size"), keys.count("first_k_dense_replace")
    return Experts(
        count=count,
        top_k=top_k,
        ffn_hidden_size=ffn,
        layers=tuple(layer >= dense for layer in range(keys.size("num_hidden_layers"))),
        shared_ffn_hidden_size=ffn * keys.count("n_shared_experts"),
        score="sigmoid",
        normalise=top_k > 1 or keys.get("norm_topk_prob", bool),
        scale=keys.get("routed_scaling_factor", float),
        groups=groups,
        groups_kept=kept,
        bias=True,
        aux_loss_coeff=keys.get("aux_loss_alpha", float, 0.0),
    )


def mtp_layers(keys: Keys) -> int:
    """Layers of multi-token prediction that the files hold besides the model."""
    return keys.count("num_nextn_predict_layers" if "num_nextn_predict_layers" in keys.values else "num_mtp_layers")


def _top_k(keys: Keys, count: int) -> int:
    top_k = keys.size("num_experts_per_tok")
    if top_k > count:
        raise ModelError(f"{keys.where}: num_experts_per_tok = {top_k} is more than the {count} experts.")
    return top_k
