"""Which options of SGLang's a run passes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ctpo_megatron.engine.options import REFUSED, THRESHOLDS, check_options
from ctpo_megatron.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "rollouts.md"
ALLOWED = (
    ("--mem-fraction-static", "0.8"),
    ("--speculative-algorithm", "STANDALONE", "--speculative-accept-threshold-single", "1.0"),
    ("--enable-hierarchical-cache", "--kv-cache-dtype=fp8_e4m3"),
    ("--model-loader-extra-config", "{}", "--ep-num-redundant-experts", "1"),
    (),
)


@pytest.mark.parametrize("words", ALLOWED)
def test_what_is_passed_on(words: tuple[str, ...]) -> None:
    check_options(words)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """In every form that SGLang reads, with the reason; all of them at once."""
    for words in ((f"--{name}", "1"), (f"--{name}=1",), (f"--{name.replace('-', '_')}", "1"), ("--a", "b", f"--{name}")):
        with pytest.raises(ConfigError, match=re.escape(f"--{name}: {REFUSED[name]}")):
            check_options(words)
    with pytest.raises(ConfigError, match=rf"--{name}: .*; --disaggregation-mode: "):
        check_options((f"--{name}", "1", "--disaggregation-mode", "decode"))


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("value", ["0.9", "", "x", "nan"])
def test_drafts_are_only_taken_as_the_model_would(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} {value}: below 1"):
        check_options((f"--{name}", value))


def test_the_page_names_them() -> None:
    page = PAGE.read_text()
    assert [name for name in (*REFUSED, *THRESHOLDS) if f"`--{name}`" not in page] == []
