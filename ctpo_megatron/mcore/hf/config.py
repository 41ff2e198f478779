"""What a Hugging Face model directory says about the model, checked before anything is started.

Needs neither torch nor megatron, so `ctpo` can refuse a wrong directory in the first second.
Keys and defaults: transformers' Qwen2Config, Qwen3Config, Qwen3MoeConfig and LlamaConfig, version 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import ConfigError, ModelError, near_miss
from ctpo_megatron.mcore.hf.files import check_safetensors, check_tokenizer, read_json
from ctpo_megatron.mcore.hf.keys import Keys
from ctpo_megatron.mcore.shape import Experts, HeadAttention, Llama3Scaling, ModelShape, Rope

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "llama3")


def read_hf_config(path: str | Path) -> ModelShape:
    """The shape of the model in `path`, after checking that the directory is complete.

    Raises ModelError for a missing or broken file and for a model that this package cannot train.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory. model.path must be a local directory in Hugging Face format.")
    config = read_json(directory / "config.json")
    check_tokenizer(directory)
    check_safetensors(directory)
    return parse_config(config, str(directory / "config.json"))


def parse_config(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that the content of a config.json describes; `where` names it in errors (ModelError)."""
    keys = Keys(config, where)
    family = keys.get("model_type", str)
    if family not in FAMILIES:
        hint = near_miss(family, FAMILIES)
        raise ModelError(f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}.{hint}")
    _check_plain_attention(keys, family)
    hidden, heads, layers = keys.size("hidden_size"), keys.size("num_attention_heads"), keys.size("num_hidden_layers")
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=keys.size("intermediate_size"),
        num_heads=heads,
        attention=HeadAttention(
            num_kv_heads=keys.size("num_key_value_heads", heads),
            head_dim=keys.size("head_dim", 128 if family == "qwen3" else hidden // heads),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
        ),
        vocab_size=keys.size("vocab_size"),
        max_positions=keys.size("max_position_embeddings"),
        rope=_rope(keys),
        rms_eps=keys.get("rms_norm_eps", float, 1e-6),
        tie_embeddings=keys.get("tie_word_embeddings", bool, False),
        experts=_experts(keys, layers) if family == "qwen3_moe" else None,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raise ConfigError when `parallel` cannot divide the model; the message names both numbers and the sizes that can."""
    tp, pp, ep = parallel.tp, parallel.pp, parallel.ep  # that ep divides the ranks, ParallelConfig has checked
    _divides("parallel.tp", tp, "attention heads", shape.num_heads)
    if isinstance(shape.attention, HeadAttention):
        _divides("parallel.tp", tp, "key-value heads", shape.attention.num_kv_heads)
    _divides("parallel.tp", tp, "hidden units", shape.hidden_size)
    _divides("parallel.pp", pp, "layers", shape.num_layers)
    if shape.experts:
        _divides("parallel.ep", ep, "experts", shape.num_experts)
    else:
        _divides("parallel.tp", tp, "feed-forward units", shape.ffn_hidden_size)
        if ep > 1:
            raise ConfigError(f"parallel.ep = {ep}, but {shape.family} is a dense model without experts; allowed is 1.")


def _check_plain_attention(keys: Keys, family: str) -> None:
    keys.must_be("hidden_act", "silu")
    keys.must_be("use_sliding_window", False, None)
    keys.must_be("partial_rotary_factor", 1.0, None)
    keys.must_be("quantization_config", None)
    keys.must_be("mlp_bias", False, None)
    if family != "qwen2":
        keys.must_be("attention_bias", False, None)


def _rope(keys: Keys) -> Rope:
    """From transformers 5's `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    rope = keys.get("rope_parameters", dict, {}) or keys.get("rope_scaling", dict, {})
    inner = Keys(rope, f"{keys.where}: RoPE settings")
    theta = inner.get("rope_theta", float, keys.get("rope_theta", float, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        hint = near_miss(str(kind), ROPE_TYPES)
        raise ModelError(f"{keys.where}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}.{hint}")
    if kind == "default":
        inner.must_be("partial_rotary_factor", 1.0, None)
        return Rope(theta)
    scaling = Llama3Scaling(
        inner.get("factor", float),
        inner.get("low_freq_factor", float),
        inner.get("high_freq_factor", float),
        int(inner.get("original_max_position_embeddings", float)),
    )
    return Rope(theta, scaling)


def _experts(keys: Keys, layers: int) -> Experts:
    keys.must_be("decoder_sparse_step", 1)  # every layer has experts
    keys.must_be("mlp_only_layers", [], None)
    count = keys.size("num_experts" if "num_experts" in keys.values else "num_local_experts")  # transformers 4, 5
    top_k = keys.size("num_experts_per_tok")
    if top_k > count:
        raise ModelError(f"{keys.where}: num_experts_per_tok = {top_k} is more than the {count} experts.")
    return Experts(
        count=count,
        top_k=top_k,
        ffn_hidden_size=keys.size("moe_intermediate_size"),
        layers=(True,) * layers,
        normalise=keys.get("norm_topk_prob", bool, False),
        aux_loss_coeff=keys.get("router_aux_loss_coef", float, 0.001),
    )


def _divides(name: str, size: int, what: str, count: int) -> None:
    if count % size:
        raise ConfigError(f"{name} = {size} does not divide the model's {count} {what}; allowed are {_divisors(count)}.")


def _divisors(count: int) -> str:
    return ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
