"""TransformerEngine that is installed has to load: a stand-in for the package that cannot."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from ctpo_megatron.errors import InputError
from ctpo_megatron.mcore.transformer_engine import use_transformer_engine

GPU = torch.device("cuda", 0)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called transformer_engine that hides, as the real one does, whether its part for torch loads."""
    root = tmp_path / "transformer_engine"
    (root / "pytorch").mkdir(parents=True)
    (root / "__init__.py").write_text("try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_without_it_layers_are_plain() -> None:
    assert importlib.util.find_spec("transformer_engine") is None, "this environment has none, as CI"
    assert not use_transformer_engine(GPU)


def test_on_a_cpu_it_is_not_looked_at(package: Path) -> None:
    (package / "pytorch" / "__init__.py").write_text("raise ImportError('undefined symbol')\n")
    assert not use_transformer_engine(torch.device("cpu"))
    assert "transformer_engine" not in sys.modules


def test_one_that_loads_is_used(package: Path) -> None:
    (package / "pytorch" / "__init__.py").write_text("")
    assert use_transformer_engine(GPU)


@pytest.mark.parametrize("error", ["ImportError('undefined symbol: _ZN3c10')", "OSError('libtransformer_engine.so')"])
def test_one_that_does_not_load_says_why(package: Path, error: str) -> None:
    (package / "pytorch" / "__init__.py").write_text(f"raise {error}\n")
    if error.startswith("OSError"):
        (package / "__init__.py").write_text("")
    with pytest.raises(InputError, match=r"does not load: (ImportError: undefined symbol|OSError: libtransf).*make install-gpu"):
        use_transformer_engine(GPU)
