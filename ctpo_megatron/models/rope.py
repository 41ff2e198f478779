"""What config.json says about the rotary position embedding, as transformers 4 and 5 write it."""

from __future__ import annotations

import math

from ctpo_megatron.errors import ModelError, near_miss
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.shape import Llama3Scaling, Rope, YarnScaling

ROPE_TYPES = ("default", "llama3", "yarn")


def read_rope(keys: Keys, *, theta: float = 10000.0, fraction: float = 1.0, types: tuple[str, ...] = ROPE_TYPES) -> Rope:
    """From transformers 5's `rope_parameters`, or from `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    `theta` and `fraction` are the family's defaults, `types` the scalings that it is supported with. Raises ModelError.
    """
    values = keys.get("rope_parameters", dict, {}) or keys.get("rope_scaling", dict, {})
    inner = Keys(values, f"{keys.where}: RoPE settings")
    theta = inner.get("rope_theta", float, keys.get("rope_theta", float, theta))
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in types:
        hint = near_miss(str(kind), types)
        raise ModelError(f"{keys.where}: rope type {kind!r} is not supported; supported are {', '.join(types)}.{hint}")
    if fraction == 1.0:
        for found in (keys, inner):
            found.must_be("partial_rotary_factor", 1.0, None)
    fraction = inner.get("partial_rotary_factor", float, keys.get("partial_rotary_factor", float, fraction))
    scaling = {"default": lambda _: None, "llama3": _llama3, "yarn": _yarn}[kind](inner)
    return Rope(theta, scaling, fraction)


def _llama3(inner: Keys) -> Llama3Scaling:
    return Llama3Scaling(
        inner.get("factor", float),
        inner.get("low_freq_factor", float),
        inner.get("high_freq_factor", float),
        int(inner.get("original_max_position_embeddings", float)),
    )


def _yarn(inner: Keys) -> YarnScaling:
    """transformers takes the factor of what is rotated from `attention_factor`, or else from both mscales, or from neither."""
    inner.must_be("truncate", True, None)  # bands begin and end at whole dimensions
    factor = inner.get("factor", float)
    if factor <= 1.0:
        raise ModelError(f"{inner.where}: factor is {factor}, but must be more than 1 for yarn.")
    mscale, all_dim = inner.get("mscale", float, 0.0), inner.get("mscale_all_dim", float, 0.0)
    wanted = inner.get("attention_factor", float, 0.0)
    if wanted or not (mscale and all_dim):  # the mscale that comes to the same
        unit = 0.1 * math.log(factor)
        mscale = ((wanted or 1.0 + unit) * (1.0 + unit * all_dim) - 1.0) / unit if wanted or all_dim else 1.0
    return YarnScaling(
        factor=factor,
        original_max_positions=int(inner.get("original_max_position_embeddings", float)),
        beta_fast=inner.get("beta_fast", float, 32.0),
        beta_slow=inner.get("beta_slow", float, 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
