"""Every key of RoPE: what is accepted, transformers and SGLang read alike, and so do we; the rest is refused by name."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import Llama3Scaling, Rope, YarnScaling
from tests.support.often import often
from tests.unit.models.test_defaults import BASES

HEAD = 32
DENSE = {key: value for key, value in BASES["qwen3"].items() if key not in ("rope_scaling", "rope_theta")} | {"head_dim": HEAD}
LATENT = {key: value for key, value in BASES["deepseek_v3"].items() if key not in ("rope_scaling", "rope_theta", "head_dim")} | {
    "qk_rope_head_dim": HEAD
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
M = 0.1 * math.log(4.0) + 1.0  # what yarn multiplies by, with a factor of 4 and nothing else said


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        parse_config(config)
    return str(caught.value)


def class_of(config: dict[str, Any]) -> Any:
    """What transformers reads from the file; it writes into the dictionaries that it is given."""
    return CONFIG_MAPPING[config["model_type"]](**deepcopy({key: value for key, value in config.items() if key != "model_type"}))


def by_transformers(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, and what is multiplied with what is rotated, as the model's own rotary embedding has them."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    read = class_of(config)
    rotary = (DeepseekV3RotaryEmbedding if config["model_type"] == "deepseek_v3" else Qwen3RotaryEmbedding)(read)
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def by_sglang(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The same of the embedding that SGLang's models build from the file, which transformers' class reads for them."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope, get_rope_cpu
    from sglang.srt.utils.hf_transformers.common import get_rope_config

    theta, rope = get_rope_config(class_of(config))
    options = (HEAD, HEAD, config["max_position_embeddings"], theta)
    if config["model_type"] == "deepseek_v3":
        rotary = get_rope_cpu(*options, rope_scaling=rope | {"rope_type": "deepseek_yarn"}, dtype=torch.float32, device="cpu")
    else:
        rotary = get_rope(*options, rope_scaling=rope, dtype=torch.float32)
    stretched = rope["rope_type"] == "yarn"
    return rotary._compute_inv_freq(rotary.scaling_factor if stretched else theta).double(), getattr(rotary, "mscale", 1.0)


def by_us(rope: Rope) -> tuple[torch.Tensor, float]:
    """The same as the shape describes them, by the papers' formulas."""
    plain = rope.theta ** -(torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    scaling = rope.scaling
    if scaling is None:
        return plain, 1.0
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    if isinstance(scaling, Llama3Scaling):
        kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
        return plain * (kept + (1 - kept) / scaling.factor), 1.0

    def dimension(rotations: float) -> float:
        return HEAD * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    low, high = max(math.floor(dimension(scaling.beta_fast)), 0), min(math.ceil(dimension(scaling.beta_slow)), HEAD - 1)
    stretched = ((torch.arange(HEAD // 2, dtype=torch.float64) - low) / (high - low + 0.001 * (high == low))).clamp(0, 1)
    return plain * (1 - stretched + stretched / scaling.factor), m(scaling.mscale) / m(scaling.mscale_all_dim)


def agree(first: tuple[torch.Tensor, float], second: tuple[torch.Tensor, float]) -> bool:
    return torch.allclose(first[0], second[0], rtol=2e-6, atol=0.0) and math.isclose(first[1], second[1], rel_tol=1e-6)


def optional(**values: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A dictionary with some of the keys, or all, or none."""
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(each) for key, each in values.items()})


MSCALES = [0.0, 0.7, 1, 2.0]
EXTRAS = optional(
    attention_factor=[1.0, M, 0.9, None],
    attn_factor=[1, 1.0 / M, 0.9 / M, 0.8782488562869419],
    mscale=MSCALES,
    mscale_all_dim=MSCALES,
    beta_fast=[32, 2.0],
    beta_slow=[1, 0.5],
    truncate=[True],
    extrapolation_factor=[1],
)


@pytest.mark.parametrize("base", [DENSE, LATENT], ids=["heads", "latent"])
@settings(max_examples=often(60), deadline=None)
@given(extras=EXTRAS, theta=st.sampled_from([100.0, 10000]), beside=st.booleans())
def test_yarn_is_read_as_both_read_it_or_refused_where_they_differ(
    base: dict[str, Any], extras: dict[str, Any], theta: float, beside: bool
) -> None:
    rope = YARN | extras | ({} if beside else {"rope_theta": theta})
    config = base | {"rope_scaling": rope} | ({"rope_theta": theta} if beside else {})
    theirs, served = by_transformers(config), by_sglang(config)
    if agree(theirs, served):
        ours = parse_config(config).rope
        assert isinstance(ours.scaling, YarnScaling)
        assert agree(by_us(ours), theirs)
        if base is LATENT:  # which logits are multiplied by as well, on all sides
            assert ours.scaling.mscale_all_dim == (rope.get("mscale_all_dim") or 0.0)
    else:
        message = refusal(config)
        assert "attention_factor" in message
        assert "attn_factor" in message


@pytest.mark.parametrize(
    "rope", [{}, {"rope_type": "default"}, {"type": "default", "rope_theta": 500.0}, LLAMA3, LLAMA3 | {"factor": 32}]
)
@pytest.mark.parametrize("theta", [{}, {"rope_theta": 500.0}])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_other_types_are_read_as_both_read_them(rope: dict[str, Any], theta: dict[str, float], name: str) -> None:
    config = DENSE | {name: rope} | theta
    ours = by_us(parse_config(config).rope)
    assert agree(ours, by_transformers(config))
    assert agree(ours, by_sglang(config))


def test_what_the_advice_says_is_accepted() -> None:
    """The keys of the published DeepSeek-R1-0528-Qwen3-8B, and of the same file with transformers' name instead."""
    published = YARN | {"attn_factor": 0.8782488562869419}
    message = refusal(DENSE | {"rope_theta": 10000.0, "rope_scaling": published})
    assert '"attention_factor": 1.0 with "attn_factor": 0.8782488562869419' in message
    both = parse_config(DENSE | {"rope_theta": 10000.0, "rope_scaling": published | {"attention_factor": 1.0}})
    assert by_us(both.rope)[1] == pytest.approx(1.0, rel=1e-12)
    assert "SGLang by 1.13863" in refusal(DENSE | {"rope_scaling": YARN | {"attention_factor": 1.0}})
    assert '"attention_factor": 0.5 with "attn_factor":' in refusal(DENSE | {"rope_scaling": YARN | {"attention_factor": 0.5}})
    assert "SGLang" in refusal(LATENT | {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}), "a lone mscale of latent attention"


def test_two_sets_of_settings() -> None:
    """transformers follows rope_scaling where both are there; equal ones are one."""
    ours, theta = YARN | {"rope_theta": 500.0}, {"rope_theta": 500.0}
    both = DENSE | theta | {"rope_scaling": YARN, "rope_parameters": ours}
    assert parse_config(both).rope == parse_config(DENSE | {"rope_parameters": ours}).rope
    for change in ({"factor": 8.0}, {"rope_type": "default"}, {"rope_theta": 600.0}, {"beta_fast": 16}):
        changed = {key: value for key, value in ours.items() if change != {"rope_type": "default"} or key == "rope_theta"}
        message = refusal(DENSE | {"rope_scaling": ours, "rope_parameters": changed | change})
        assert "rope_scaling = " in message
        assert "rope_parameters = " in message
        assert "contradict" in message
    without = refusal(DENSE | {"rope_scaling": YARN, "rope_parameters": ours})  # theta is then the class's for transformers
    assert "contradict" in without
    assert parse_config(DENSE | {"rope_scaling": {}, "rope_parameters": ours}).rope == parse_config(both).rope
    assert parse_config(DENSE | {"rope_scaling": None, "rope_parameters": ours}).rope == parse_config(both).rope


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["original_max_position_embeddings", "missing", "= 512"]),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": None}}, ["is null"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["'linear' is not supported", "default, llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic' is not supported"]),
        ({"rope_scaling": {"rope_type": "lama3", "factor": 2.0}}, ["'lama3'", "Did you mean 'llama3'?"]),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, ["'linear' and 'yarn'"]),
        ({"rope_scaling": {"factor": 2.0}}, ["factor = 2.0 is not a key of rope type 'default'"]),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, ["mrope_section"]),
        ({"rope_scaling": YARN | {"beta_fasst": 16}}, ["beta_fasst = 16", "Did you mean 'beta_fast'?"]),
        ({"rope_scaling": YARN | {"attention_factr": 1.0}}, ["attention_factr", "Did you mean"]),
        ({"rope_scaling": YARN | {"apply_scale": False}}, ["apply_scale"]),
        ({"rope_scaling": YARN | {"extrapolation_factor": 0.5}}, ["extrapolation_factor is 0.5"]),
        ({"rope_scaling": YARN | {"truncate": None}}, ["truncate is null"]),
        ({"rope_scaling": YARN | {"beta_fast": None}}, ["beta_fast is null"]),
        ({"rope_scaling": YARN | {"mscale": None}}, ["mscale is null"]),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, ["beta_slow is 0.0", "more than 0"]),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096.5}}, ["4096.5", "whole number"]),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, ["attention_factor is 0.0", "more than 0"]),
        ({"rope_scaling": YARN | {"factor": "4"}}, ["factor is '4'", "float"]),
        ({"rope_scaling": YARN | {"factor": math.inf}}, ["factor is inf", "finite"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ["low_freq_factor = 4.0 must be less"]),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 1.0}}, ["attention_factor", "rope type 'llama3'"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ({"rope_theta": 100.0, "rope_parameters": {"rope_theta": 200.0}}, ["rope_theta is 200.0", "100.0"]),
        ({"rope_theta": None}, ["rope_theta is null"]),
        ({"rope_theta": 0}, ["rope_theta is 0.0"]),
        ({"rope_parameters": {"rope_theta": None}}, ["rope_theta is null"]),
        ({"rope_parameters": []}, ["rope_parameters is []", "dict"]),
        ({"attn_factor": 0.9}, ["attn_factor = 0.9", "beside the settings of RoPE"]),
        ({"rotary_pct": 0.25}, ["rotary_pct = 0.25"]),
        ({"rope_thetta": 1e6}, ["rope_thetta", "Did you mean 'rope_theta'?"]),
        ({"use_mrope": True}, ["use_mrope = True"]),
        ({"rope_interleaved": True}, ["rope_interleaved is True"]),
        ({"rope_is_neox_style": False}, ["rope_is_neox_style is False"]),
        ({"original_max_position_embeddings": 2048, "rope_scaling": YARN}, ["128", "2048"]),
    ],
)
def test_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    message = refusal(DENSE | change)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("mixtral", {"rope_scaling": YARN}, "'yarn' is not supported; supported are default"),
        ("mixtral", {"rope_scaling": LLAMA3}, "'llama3' is not supported"),
        ("mixtral", {"rope_theta": 1234.5}, "rope_theta is 1234.5; SGLang"),
        ("mixtral", {"head_dim": 48}, "head_dim is 48; SGLang takes hidden / heads = 32"),
        ("deepseek_v3", {"rope_scaling": LLAMA3}, "'llama3' is not supported"),
        ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor is null"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, and beside"),
    ],
)
def test_what_sglang_passes_over_in_a_family(family: str, change: dict[str, Any], words: str) -> None:
    assert words in refusal(BASES[family] | change)


def test_what_changes_nothing_is_accepted() -> None:
    """SmolLM2 is published with rope_interleaved: false; some files repeat the old context beside the settings."""
    plain = parse_config(DENSE).rope
    assert parse_config(DENSE | {"rope_interleaved": False, "rope_is_neox_style": True, "rope_ratio": None}).rope == plain
    twice = DENSE | {"rope_scaling": YARN, "original_max_position_embeddings": 128}
    ours = parse_config(twice).rope
    assert ours == parse_config(DENSE | {"rope_scaling": YARN}).rope
    assert agree(by_us(ours), by_transformers(twice))
    assert agree(by_us(ours), by_sglang(twice))


def test_the_old_context_beside_the_settings_alone_is_read_by_transformers_only() -> None:
    rope = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    config = DENSE | {"rope_scaling": rope, "original_max_position_embeddings": 128}
    assert not agree(by_transformers(config), by_sglang(config))
    assert "original_max_position_embeddings' is missing" in refusal(config)
