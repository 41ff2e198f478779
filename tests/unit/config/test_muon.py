"""Muon is refused by name, for reasons that still hold of what is installed."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("name", ["muon", "Muon", "dist_muon"])
def test_it_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.type.*muon is not available.*emerging_optimizers.*allowed: adamw"):
        load_config(CONFIG, [f"optimizer.type={name}"])


def test_other_names_are_answered_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.type.*'adamw'"):
        load_config(CONFIG, ["optimizer.type=lion"])
    assert load_config(CONFIG, ["optimizer.type=adamw"]) == load_config(CONFIG, [])


@pytest.mark.thorough
def test_the_reasons_hold() -> None:
    """Where this fails, megatron or Python have moved: look whether Muon can be taken."""
    import megatron.core

    source = (Path(inspect.getfile(megatron.core)).parent / "optimizer" / "muon.py").read_text(encoding="utf-8")
    assert "from emerging_optimizers.orthogonalized_optimizers import" in source
    assert "raise Exception('muon with dist optimizer is not supported.')" in source
    assert sys.version_info < (3, 12) or importlib.util.find_spec("emerging_optimizers") is None
