"""Functions that numba compiles and that are kept, in a directory that their text names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TEXT = """
from numba import types
import numba
from {other} import step
from ctpo_megatron.kernels.compiled import compiled
import {other}

@compiled(types.int64(types.int64), (__file__, {other}.__file__))
def count(x):
    return x + step()
"""
STEP = "import numba\n\n@numba.njit(inline='always')\ndef step():\n    return {}\n"


def load(directory: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, directory / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kept", [True, False])
def test_what_was_compiled_is_loaded_until_its_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """The text of another file too, at which numba itself does not look. Where Python keeps nothing, nothing is kept."""
    monkeypatch.setattr(sys, "dont_write_bytecode", not kept)
    (tmp_path / "kept_main.py").write_text(TEXT.format(other="kept_other"))

    def count(step: int) -> ModuleType:
        (tmp_path / "kept_other.py").write_text(STEP.format(step))
        monkeypatch.setitem(sys.modules, "kept_other", load(tmp_path, "kept_other"))
        monkeypatch.setitem(sys.modules, "kept_main", ModuleType("kept_main"))
        return load(tmp_path, "kept_main").count

    first, again, changed = count(1), count(1), count(22)  # of another size: Python looks at whole seconds
    assert [function(40) for function in (first, again, changed)] == [41, 41, 62]
    hits = [sum(function.stats.cache_hits.values()) for function in (first, again, changed)]
    assert hits == [0, int(kept), 0]
    assert len(list(tmp_path.rglob("numba-*"))) == 2 * kept
