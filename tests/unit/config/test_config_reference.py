"""docs/configuration.md says what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from ctpo_megatron.config.explain import dotted_keys

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "tools" / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(reference: ModuleType) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.render(), "run: .venv/bin/python tools/config_reference.py"


def test_every_key_has_a_row_and_an_explanation(reference: ModuleType) -> None:
    rows = [line for line in reference.render().splitlines() if line.startswith("| `")]
    names = {row.split("`")[1] for row in rows}
    assert {key.rsplit(".", 1)[-1] for key in dotted_keys()} == names
    silent = [row for row in rows if row.endswith("|  |") and not row.startswith("| `type`")]
    assert silent == []


def test_bounds_choices_and_null_are_shown(reference: ModuleType) -> None:
    page = reference.render()
    assert "| `beta1` | number >= 0, < 1 | `0.9` |" in page
    assert "| `dtype` | `auto`, `float32`, `bfloat16` | `auto` |" in page
    assert "| `eval` | text or null | `null` |" in page
    assert "position\\*\\*power" in page
