"""What imports are spared."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from ctpo_megatron import imports
from ctpo_megatron.imports import packages_distributions, packages_told_quickly


@pytest.mark.skipif(imports.TELLS_OTHERWISE, reason="this Python infers names of packages in another way, and is left alone")
def test_distributions_are_those_that_python_tells() -> None:
    """Of all that is installed here. What declares no packages has them in no order."""
    theirs = importlib.metadata.packages_distributions()
    assert packages_distributions() == theirs
    assert len(theirs) > 100


@pytest.mark.parametrize("otherwise", [False, True])
def test_python_answers_itself_afterwards(monkeypatch: pytest.MonkeyPatch, otherwise: bool) -> None:
    monkeypatch.setattr(imports, "TELLS_OTHERWISE", otherwise)
    before = importlib.metadata.packages_distributions
    with packages_told_quickly():
        assert importlib.metadata.packages_distributions is (before if otherwise else packages_distributions)
    assert importlib.metadata.packages_distributions is before


def test_transformers_still_asks_when_it_is_imported() -> None:
    """Once it does not, `packages_told_quickly` can go."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "utils" / "import_utils.py").read_text()
    assert "\nPACKAGE_DISTRIBUTION_MAPPING = importlib.metadata.packages_distributions()\n" in text
