"""Which options of SGLang's a run passes on."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import ValidationError

from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.config.sglang_options import REFUSED, THRESHOLDS, check_options

PAGE = Path(__file__).parents[3] / "docs" / "traffic.md"
ALLOWED = (
    ("--mem-fraction-static", "0.8"),
    ("--speculative-algorithm", "STANDALONE", "--speculative-accept-threshold-single", "1.0"),
    ("--enable-hierarchical-cache", "--kv-cache-dtype=fp8_e4m3"),
    ("--model-loader-extra-config", "{}", "--ep-num-redundant-experts", "1"),
    ("--quantization-param-path", "x", "--disaggregation-ib-device", "x"),
    (),
)


@pytest.mark.parametrize("words", ALLOWED)
def test_what_is_passed_on(words: tuple[str, ...]) -> None:
    assert EngineConfig(extra_args=words).extra_args == words


@pytest.mark.parametrize("name", [*REFUSED, *THRESHOLDS])
def test_what_is_refused(name: str) -> None:
    """In every form that SGLang reads, short ones too, with the reason; all of them at once."""
    why = REFUSED.get(name, "below 1 ")
    short = f"--{name[: max(2, len(name) - 2)]}"
    forms = (f"--{name}", "x"), (f"--{name}=x",), (f"--{name.replace('-', '_')}", "x"), ("--x", "b", f"--{name}"), (short, "x")
    for words in forms:
        with pytest.raises(ValueError, match=re.escape(f"--{name} is not allowed: {why}")):
            check_options(words)
    with pytest.raises(ValidationError, match=rf"(?s)--{name} is .*; --disaggregation-mode is |--disaggregation-mode is "):
        EngineConfig(extra_args=(f"--{name}", "x", "--disaggregation-mode", "decode"))


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("value", ["0.9", "", "x", "nan"])
def test_drafts_are_only_taken_as_the_model_would(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} is not allowed: below 1"):
        check_options((f"--{name}", value))


def test_the_page_names_them() -> None:
    page = PAGE.read_text()
    assert [name for name in (*REFUSED, *THRESHOLDS) if f"`--{name}`" not in page] == []


def test_sglang_knows_them() -> None:
    """Or they have another name by now. tests/integration/test_sglang_parts.py asks its parser."""
    source = Path(find_spec("sglang").origin).parent / "srt"
    text = "".join(file.read_text() for file in [source / "server_args.py", *(source / "arg_groups" / "fields").glob("*.py")])
    unknown = [
        name
        for name in (*REFUSED, *THRESHOLDS)
        if f'"--{name}"' not in text and not re.search(rf"\b{name.replace('-', '_')}\b", text)
    ]
    assert unknown == []
