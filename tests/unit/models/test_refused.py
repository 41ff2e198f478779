"""Families that are known and not trained: refused by name with the reason, and the reason still holds of what is installed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.families import FAMILIES
from ctpo_megatron.models.families.refused import REFUSED

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name_with_the_reason(family: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config({"model_type": family})
    assert f"model_type '{family}' is not supported: {REFUSED[family]}." in str(caught.value)
    assert "Supported are deepseek_v3, " in str(caught.value)


def test_none_is_both_taken_and_refused() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()


def test_the_page_has_a_row_for_each() -> None:
    named = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text(encoding="utf-8")))
    assert REFUSED.keys() | FAMILIES.keys() <= named


def megatron(path: str) -> str:
    """Source of a file of megatron-core, which is read and not imported."""
    import megatron.core

    return (Path(inspect.getfile(megatron.core)).parent / path).read_text(encoding="utf-8")


def test_what_megatron_lacks_it_still_lacks() -> None:
    """Where one of these fails, megatron has learned something: look at the families that are refused for it."""
    delta_net = megatron("ssm/gated_delta_net.py")
    assert 'raise NotImplementedError("GDN does not support packed sequence for now.")' in delta_net
    assert "TODO: Implement GatedDeltaNetContextParallel" in delta_net
    assert "Packed sequence is not supported for DSAttention" in megatron("transformer/experimental_attention_variant/dsa.py")
    assert "Packed sequence is not supported by DotProductAttention" in megatron("transformer/dot_product_attention.py")
    config = megatron("transformer/transformer_config.py")
    fields = set(re.findall(r"^    (\w+): ", config, re.MULTILINE))
    assert {"softmax_type", "window_size", "no_rope_freq", "experimental_attention_variant"} <= fields, "what it has"
    assert not [name for name in fields if re.search("chunk_size|attn_scale|llama_4|temperature|embedding_scale|post_norm", name)]
    assert "Literal['gated_delta_net', 'dsa']" in config


def test_transformers_does_not_know_kimi_k2() -> None:
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    assert "kimi_k2" not in CONFIG_MAPPING_NAMES
    assert {"kimi_k25", "kimi_linear", *FAMILIES} <= CONFIG_MAPPING_NAMES.keys()
