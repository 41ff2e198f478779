"""What a Hugging Face model directory says about the model, checked before anything is started.

Needs neither torch nor megatron, so `ctpo` can refuse a wrong directory in the first second.
Keys and defaults: transformers' Qwen2Config, Qwen3Config, Qwen3MoeConfig and LlamaConfig, version 4 and 5.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import ConfigError, ModelError, near_miss

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
INDEX_FILE = "model.safetensors.index.json"
ROPE_TYPES = ("default", "llama3")
LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
TOKENIZER_BODIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything that decides the parameters and the forward pass of a supported model."""

    family: str  # one of FAMILIES
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the dense MLP; unused where num_experts > 0
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, as in config.json
    max_positions: int
    rope_theta: float
    rope_scaling: dict[str, float] | None  # the keys LLAMA3_ROPE_KEYS, or None for plain RoPE
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0  # 0: dense
    experts_top_k: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = False
    moe_aux_loss_coeff: float = 0.0
    dtype: str = "float32"  # number format of the stored weights, as config.json names it

    @property
    def is_moe(self) -> bool:
        """True where the MLPs are mixtures of experts."""
        return self.num_experts > 0

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding that `tp` ranks share equally; rows from vocab_size on are zero and must be masked."""
        return -(-self.vocab_size // tp) * tp


def read_hf_config(path: str | Path) -> ModelShape:
    """The shape of the model in `path`, after checking that the directory is complete.

    Raises ModelError for a missing or broken file and for a model that this package cannot train.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory. model.path must be a local directory in Hugging Face format.")
    config = _read_json(directory / "config.json")
    _check_tokenizer(directory)
    _check_safetensors(directory)
    return parse_config(config, str(directory / "config.json"))


def parse_config(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that the content of a config.json describes; `where` names it in errors (ModelError)."""
    keys = _Keys(config, where)
    family = keys.get("model_type", str)
    if family not in FAMILIES:
        hint = near_miss(family, FAMILIES)
        raise ModelError(f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}.{hint}")
    _check_plain_attention(keys, family)
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    theta, scaling = _rope(keys)
    return ModelShape(
        family=family,
        num_layers=keys.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=keys.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=keys.size("head_dim", 128 if family == "qwen3" else hidden // heads),
        vocab_size=keys.size("vocab_size"),
        max_positions=keys.size("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=keys.get("rms_norm_eps", float, 1e-6),
        tie_embeddings=keys.get("tie_word_embeddings", bool, False),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        **(_experts(keys) if family == "qwen3_moe" else {}),
    )


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raise ConfigError when `parallel` cannot divide the model; the message names both numbers and the sizes that can."""
    tp, pp, ep = parallel.tp, parallel.pp, parallel.ep  # that ep divides the ranks, ParallelConfig has checked
    _divides("parallel.tp", tp, "attention heads", shape.num_heads)
    _divides("parallel.tp", tp, "key-value heads", shape.num_kv_heads)
    _divides("parallel.tp", tp, "hidden units", shape.hidden_size)
    _divides("parallel.pp", pp, "layers", shape.num_layers)
    if shape.is_moe:
        _divides("parallel.ep", ep, "experts", shape.num_experts)
    else:
        _divides("parallel.tp", tp, "feed-forward units", shape.ffn_hidden_size)
        if ep > 1:
            raise ConfigError(f"parallel.ep = {ep}, but {shape.family} is a dense model without experts; allowed is 1.")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, sorted. Raises ModelError when there are none or the index lists missing ones."""
    index = directory / INDEX_FILE
    if index.exists():
        names = set(_read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing:
            raise ModelError(f"{directory}: {INDEX_FILE} lists {', '.join(missing)}, which is missing. Fetch the model again.")
        files = sorted(directory / name for name in names)
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{directory}: no *.safetensors weights. Formats such as pytorch_model.bin are not read, because they hold "
            "pickled code; save the model once with save_pretrained(..., safe_serialization=True)."
        )
    return files


class _Keys:
    """Typed access to config.json whose errors name the file, the key, what was found and what is allowed."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of `key`; null counts as absent; an absent key without default is an error."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: key {key!r} is missing.{near_miss(key, self.values)}")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.where}: {key} is {value!r}, but must be of type {kind.__name__}.")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key, int, default)
        if value < 1:
            raise ModelError(f"{self.where}: {key} is {value}, but must be at least 1.")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any other value, where the key is present at all."""
        if key in self.values and self.values[key] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise ModelError(f"{self.where}: {key} is {self.values[key]!r}; this package trains only models with {wanted}.")


def _check_plain_attention(keys: _Keys, family: str) -> None:
    keys.must_be("hidden_act", "silu")
    keys.must_be("use_sliding_window", False, None)
    keys.must_be("partial_rotary_factor", 1.0, None)
    keys.must_be("quantization_config", None)
    keys.must_be("mlp_bias", False, None)
    if family != "qwen2":
        keys.must_be("attention_bias", False, None)


def _rope(keys: _Keys) -> tuple[float, dict[str, float] | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    rope = keys.get("rope_parameters", dict, {}) or keys.get("rope_scaling", dict, {})
    inner = _Keys(rope, f"{keys.where}: RoPE settings")
    theta = inner.get("rope_theta", float, keys.get("rope_theta", float, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        hint = near_miss(str(kind), ROPE_TYPES)
        raise ModelError(f"{keys.where}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}.{hint}")
    if kind == "default":
        inner.must_be("partial_rotary_factor", 1.0, None)
        return theta, None
    return theta, {key: inner.get(key, float) for key in LLAMA3_ROPE_KEYS}


def _experts(keys: _Keys) -> dict[str, Any]:
    keys.must_be("decoder_sparse_step", 1)  # every layer has experts
    keys.must_be("mlp_only_layers", [], None)
    count = keys.size("num_experts" if "num_experts" in keys.values else "num_local_experts")  # transformers 4, 5
    top_k = keys.size("num_experts_per_tok")
    if top_k > count:
        raise ModelError(f"{keys.where}: num_experts_per_tok = {top_k} is more than the {count} experts.")
    return {
        "num_experts": count,
        "experts_top_k": top_k,
        "moe_ffn_hidden_size": keys.size("moe_intermediate_size"),
        "norm_topk_prob": keys.get("norm_topk_prob", bool, False),
        "moe_aux_loss_coeff": keys.get("router_aux_loss_coef", float, 0.001),
    }


def _check_tokenizer(directory: Path) -> None:
    if not any(all((directory / name).is_file() for name in body) for body in TOKENIZER_BODIES):
        bodies = ", or ".join(" with ".join(body) for body in TOKENIZER_BODIES)
        raise ModelError(f"{directory}: tokenizer files are missing: found none of {bodies}.")
    if not (directory / "tokenizer_config.json").is_file():
        raise ModelError(f"{directory}: tokenizer_config.json is missing.")


def _check_safetensors(directory: Path) -> None:
    """Each file is as long as its own header says: catches cut downloads and Git LFS pointers."""
    for file in weight_files(directory):
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if length < size else {}
            end = 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{file}: not a safetensors file ({error}). Fetch the model again, with Git LFS if you use git."
            ) from error
        if end != size:
            raise ModelError(f"{file}: {size} bytes long, but its header announces {end}. Fetch the file again.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: file is missing; this is not a model directory in Hugging Face format.") from error
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, but must be a JSON object.")
    return content


def _divides(name: str, size: int, what: str, count: int) -> None:
    if count % size:
        raise ConfigError(f"{name} = {size} does not divide the model's {count} {what}; allowed are {_divisors(count)}.")


def _divisors(count: int) -> str:
    return ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
