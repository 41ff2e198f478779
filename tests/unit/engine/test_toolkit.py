"""What SGLang compiles kernels with, on toolkits that lack things; tests/processes asks SGLang itself where it looks."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from ctpo_megatron.engine.toolkit import check_toolkit, parts, torch_cuda, version_of
from ctpo_megatron.errors import InputError
from tests.support.toolkits import make_toolkit, put


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of CUDA 13.0 with all that is needed, Python's headers too."""
    root = make_toolkit(tmp_path)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path / "include")})
    return root


def environment(home: Path, **more: str) -> dict[str, str]:
    return {"CUDA_HOME": str(home), "PATH": str(home.parent / "bin")} | more


def missing(wanted: str, of: dict[str, str]) -> dict[str, str]:
    return {part.name: part.remedy for part in parts(wanted, of) if part.remedy}


def test_a_whole_toolkit_will_do(home: Path) -> None:
    assert missing("13.0", environment(home)) == {}
    check_toolkit(environment(home))


def test_what_pip_installed_is_no_toolkit() -> None:
    """torch brings an nvcc, without the library that kernels are linked against."""
    wheel = Path(torch.__file__).parent.parent / "nvidia" / "cu13"
    assert (wheel / "bin" / "nvcc").exists()
    assert "CUDA runtime" in missing("13.0", {"CUDA_HOME": str(wheel), "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(("wanted", "will_do"), [("12.8", True), ("13.0", True), ("13.1", False), ("14.0", False)])
def test_an_older_compiler_than_torchs_cuda_will_not_do(home: Path, wanted: str, will_do: bool) -> None:
    found = missing(wanted, environment(home))
    assert (found == {}) is will_do
    assert will_do or f"older than torch's CUDA {wanted}" in found["nvcc"]


def test_a_wrapper_in_path_is_not_a_toolkit(home: Path) -> None:
    """nvcc runs, but the directory above it has no library: SGLang would fail when it links."""
    put(home.parent / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    found = missing("13.0", {"PATH": f"{home.parent}/bin:/bin"})
    assert found.keys() == {"CUDA runtime"}
    assert "set CUDA_HOME" in found["CUDA runtime"]


def test_everything_that_is_missing_is_named(home: Path) -> None:
    shutil.rmtree(home)
    (home.parent / "bin" / "c++").unlink()
    (home.parent / "include" / "Python.h").unlink()
    with pytest.raises(InputError) as refused:
        check_toolkit(environment(home))
    for word in ("nvcc", "libcudart.so", "C++ compiler", "Python.h", "install the CUDA toolkit", "apt-get install g++", "-dev"):
        assert word in str(refused.value)


def test_another_compiler_may_be_named(home: Path) -> None:
    assert missing("13.0", environment(home, CXX="clang++")).keys() == {"C++ compiler"}
    put(home.parent / "bin" / "clang++")
    assert missing("13.0", environment(home, CXX="clang++")) == {}


def test_versions() -> None:
    assert version_of("Cuda compilation tools, release 13.0, V13.0.88") == (13, 0)
    assert [version_of(text) for text in ("12.8", "13.10", "None", "")] == [(12, 8), (13, 10), (0, 0), (0, 0)]
    assert torch_cuda() == torch.version.cuda
