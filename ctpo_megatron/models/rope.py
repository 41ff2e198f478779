"""What config.json says about the rotary position embedding, where transformers and SGLang read the same from it.

The trainer computes what transformers 5.19 does, the servers what SGLang 0.5.23 does. Both fill in absent keys by transformers'
rules, but each reads keys that the other passes over. What they would read differently is refused, and so is every key that
neither of them reads. tests/unit/models/test_rope.py holds this against both.
"""

from __future__ import annotations

import json
import math

from ctpo_megatron.errors import ModelError, near_miss
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.shape import Llama3Scaling, Rope, YarnScaling

ROPE_TYPES = ("default", "llama3", "yarn")
ORIGINAL = "original_max_position_embeddings"
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
SCALING_KEYS = {  # besides the common ones, by type
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": (
        "factor",
        ORIGINAL,
        "attention_factor",
        "attn_factor",
        "beta_fast",
        "beta_slow",
        "extrapolation_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
WITHIN = {key for keys in SCALING_KEYS.values() for key in keys} - {ORIGINAL}  # beside the settings these keys mean nothing
MAY_BE_NULL = ("type", "attention_factor")  # within the settings, for absent
TOP_LEVEL = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rope_interleave", "qk_rope_head_dim")
NEUTRAL = {"rope_interleaved": False, "rope_is_neox_style": True}  # of other software; allowed where they change nothing
SAME_FACTOR = 1e-6  # relative; published factors are rounded


def read_rope(keys: Keys, *, types: tuple[str, ...] = ROPE_TYPES, partial: bool = False, latent: bool = False) -> Rope:
    """From transformers 5's `rope_parameters`, or from `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    `types`: the scalings that the family is supported with. `partial`: a part of each head may be rotated. `latent`: it is for
    latent attention, where SGLang has a yarn of its own. Raises ModelError.
    """
    _check_top_level(keys)
    settings = {name: keys.get(name, dict, {}) for name in ("rope_scaling", "rope_parameters")}
    given = {name: values for name, values in settings.items() if values} or {"rope_parameters": {}}
    ropes = [_read(keys, Keys(values, f"{keys.where}: {name}"), types, partial, latent) for name, values in given.items()]
    if ropes[0] != ropes[-1]:
        said = " and ".join(f"{name} = {json.dumps(values)}" for name, values in given.items())
        top = f", with rope_theta = {keys.values['rope_theta']!r} beside them" if "rope_theta" in keys.values else ""
        raise ModelError(
            f"{keys.where}: {said}{top} contradict each other. transformers 5 follows rope_scaling and rope_theta, other "
            "readers follow rope_parameters. Keep the one that the model was trained with."
        )
    return ropes[0]


def _check_top_level(keys: Keys) -> None:
    """Refuse what looks like a setting of RoPE and is read by neither transformers nor SGLang, at least not from there.

    A switch that is off (use_mrope: false) is none.
    """
    for key, value in keys.values.items():
        if value is None:
            continue
        if key in WITHIN:
            raise ModelError(
                f"{keys.where}: {key} = {value!r} stands beside the settings of RoPE, where nothing reads it. Move it into "
                "rope_parameters (or rope_scaling), or remove it."
            )
        if key in NEUTRAL:
            keys.must_be(key, NEUTRAL[key])
        elif ("rope" in key.lower() or "rotary" in key.lower()) and key not in TOP_LEVEL and value is not False:
            hint = near_miss(key, TOP_LEVEL)
            raise ModelError(
                f"{keys.where}: {key} = {value!r} is not a known setting of RoPE; known are {', '.join(TOP_LEVEL)}.{hint}"
            )


def _read(keys: Keys, inner: Keys, types: tuple[str, ...], partial: bool, latent: bool) -> Rope:
    kind = _kind(inner, types)
    known = (*COMMON, *SCALING_KEYS[kind])
    for key, value in inner.values.items():
        if key not in known:
            hint = near_miss(key, known)
            raise ModelError(
                f"{inner.where}: {key} = {value!r} is not a key of rope type {kind!r}; allowed are {', '.join(known)}.{hint}"
            )
        if value is None and key not in MAY_BE_NULL:
            raise ModelError(f"{inner.where}: {key} is null, which cannot be computed with; remove the key or give a value.")
    if not partial:
        for found in (keys, inner):
            found.must_be("partial_rotary_factor", 1.0, None)
    theta, fraction = _either(keys, inner, "rope_theta"), _either(keys, inner, "partial_rotary_factor")
    if kind == "default":
        return Rope(theta, None, fraction)
    return Rope(theta, _llama3(keys, inner) if kind == "llama3" else _yarn(keys, inner, latent), fraction)


def _kind(inner: Keys, types: tuple[str, ...]) -> str:
    """The rope type, which older files call `type`."""
    found = {str(inner.values[name]) for name in ("rope_type", "type") if inner.values.get(name) is not None}
    if len(found) > 1:
        raise ModelError(f"{inner.where}: rope_type and type name {' and '.join(map(repr, sorted(found)))}; keep one of them.")
    kind = found.pop() if found else "default"
    if kind not in types:
        hint = near_miss(kind, types)
        raise ModelError(f"{inner.where}: rope type {kind!r} is not supported; supported are {', '.join(types)}.{hint}")
    return kind


def _either(keys: Keys, inner: Keys, key: str) -> float:
    """A positive number from within the settings or from beside them. Raises ModelError where both have one and they differ."""
    outer, own = keys.values.get(key), inner.values.get(key)
    if outer is not None and own is not None and outer != own:
        raise ModelError(f"{inner.where}: {key} is {own!r}, and beside the settings it is {outer!r}; keep one of them.")
    return keys.positive(key) if own is None else inner.positive(key)


def _original(keys: Keys, inner: Keys, kind: str) -> int:
    """The context before stretching. Neither transformers nor SGLang refuses its absence: they take the stretched one for it."""
    if ORIGINAL not in inner.values:  # beside the settings it is read by transformers' models and not by SGLang's
        context = keys.values.get("max_position_embeddings")
        raise ModelError(
            f"{inner.where}: key {ORIGINAL!r} is missing. {kind} needs the context that the model had before it was stretched; "
            f"without the key they take max_position_embeddings = {context}. Write there which it is."
        )
    found = _either(keys, inner, ORIGINAL)
    if found != int(found):
        raise ModelError(f"{inner.where}: {ORIGINAL} is {found}, but must be a whole number.")
    return int(found)


def _llama3(keys: Keys, inner: Keys) -> Llama3Scaling:
    low, high = inner.positive("low_freq_factor"), inner.positive("high_freq_factor")
    if low >= high:
        raise ModelError(f"{inner.where}: low_freq_factor = {low} must be less than high_freq_factor = {high}.")
    return Llama3Scaling(inner.positive("factor"), low, high, _original(keys, inner, "llama3"))


def _yarn(keys: Keys, inner: Keys, latent: bool) -> YarnScaling:
    inner.must_be("truncate", True)  # bands begin and end at whole dimensions
    inner.must_be("extrapolation_factor", 1)  # SGLang alone reads it
    factor = inner.get("factor", float)
    if factor <= 1.0:
        raise ModelError(f"{inner.where}: factor is {factor}, but must be more than 1 for yarn.")
    attention = _attention_factor(inner, factor, latent)
    mscale, all_dim = inner.get("mscale", float, 0.0), inner.get("mscale_all_dim", float, 0.0)
    if inner.values.get("attention_factor") is not None or not (mscale and all_dim):  # the mscale that comes to the same
        unit = 0.1 * math.log(factor)
        mscale = (attention * (1.0 + unit * all_dim) - 1.0) / unit
        mscale = 1.0 if math.isclose(mscale, 1.0, rel_tol=1e-12) else mscale
    return YarnScaling(
        factor=factor,
        original_max_positions=_original(keys, inner, "yarn"),
        beta_fast=inner.positive("beta_fast", 32.0),
        beta_slow=inner.positive("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )


def _attention_factor(inner: Keys, factor: float, latent: bool) -> float:
    """What transformers multiplies what is rotated by. Raises ModelError where SGLang would multiply by something else.

    transformers reads `attention_factor`, or else both mscales, or neither. SGLang reads `attn_factor` as a further factor of the
    mscales, passes over `attention_factor`, and takes a lone mscale for latent attention.
    """

    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    given = {key: inner.get(key, float) for key in ("mscale", "mscale_all_dim") if key in inner.values}
    mscale, all_dim = given.get("mscale", 1.0 if latent else 0.0), given.get("mscale_all_dim", 0.0)
    usual = m(given["mscale"]) / m(given["mscale_all_dim"]) if all(given.values()) and len(given) == 2 else m(1.0)
    trained = inner.positive("attention_factor", usual)
    before = m(mscale) / m(all_dim) if latent or len(given) == 2 else m(1.0)
    served = before * inner.positive("attn_factor", 1.0)
    if math.isclose(trained, served, rel_tol=SAME_FACTOR):
        return trained

    def pair(value: float) -> str:
        return f'"attention_factor": {value!r} with "attn_factor": {value / before!r}'

    raise ModelError(
        f"{inner.where}: transformers, and so the trainer, would multiply what is rotated by {trained:.6g}, and SGLang by "
        f"{served:.6g}: transformers reads attention_factor and not attn_factor, SGLang the other way round, and they read a "
        f"lone or zero mscale differently. Write what both read the same: {pair(served)} for {served:.6g}, or {pair(trained)} "
        f"for {trained:.6g}, whichever the model was trained with."
    )
