"""What SGLang compiles kernels with: looked for where SGLang looks, on toolkits that lack things."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from ctpo_megatron.engine.toolkit import check_toolkit, cuda_home, parts, torch_cuda, version_of
from ctpo_megatron.errors import InputError

# SGLang's own search, in each of the environments that come in. Its functions remember what they found; what they wrap does not.
SGLANG_FINDS = """
import json, os, sys
from sglang.kernels.jit.utils.compile.toolchain import cuda_home, host_compiler_path
found = []
for case in json.load(sys.stdin):
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        os.environ.pop(name, None)
    os.environ.update(case)
    found.append([cuda_home.__wrapped__(), host_compiler_path.__wrapped__()])
print(json.dumps(found))
"""


def put(path: Path, body: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of CUDA 13.0 with all that is needed, Python's headers too."""
    root = tmp_path / "cuda"
    put(root / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart.so").touch()
    put(tmp_path / "bin" / "c++")
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


@pytest.mark.timeout(300)
def test_it_looks_where_sglang_looks(home: Path, tmp_path: Path) -> None:
    """In CUDA_HOME, CUDA_PATH, beside the nvcc of PATH, in /usr/local/cuda: never in what pip installed with torch."""
    put(tmp_path / "path" / "bin" / "nvcc")
    bare = str(tmp_path / "bin")
    cases = [
        {"CUDA_HOME": str(home), "CUDA_PATH": "/elsewhere", "PATH": bare},
        {"CUDA_PATH": str(home), "PATH": bare, "CXX": "clang++"},
        {"PATH": f"{tmp_path}/path/bin:{bare}"},
        {"PATH": bare},
    ]
    command = [sys.executable, "-c", SGLANG_FINDS]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, (theirs, compiler) in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert str(cuda_home(case)) == theirs, case
        assert compiler == case.get("CXX", "c++")
    assert cuda_home(cases[-1]) == Path("/usr/local/cuda")


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
