"""A toolkit for CUDA is looked for where SGLang looks: SGLang itself is asked, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ctpo_megatron.engine.toolkit import cuda_home
from tests.support.toolkits import make_toolkit, put

# SGLang's own search, in each of the environments that come in. Its functions remember what they found; what they wrap does not.
SGLANG_FINDS = """
import json, os, sys
from ctpo_megatron.engine.sglang.imports import hide_kernels
from ctpo_megatron.imports import modules_stay
hide_kernels()
with modules_stay():
    from sglang.kernels.jit.utils.compile.toolchain import cuda_home, host_compiler_path
found = []
for case in json.load(sys.stdin):
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        os.environ.pop(name, None)
    os.environ.update(case)
    found.append([cuda_home.__wrapped__(), host_compiler_path.__wrapped__()])
print(json.dumps(found))
"""


@pytest.mark.timeout(300)
def test_it_looks_where_sglang_looks(tmp_path: Path) -> None:
    """In CUDA_HOME, CUDA_PATH, beside the nvcc of PATH, in /usr/local/cuda: never in what pip installed with torch."""
    home = make_toolkit(tmp_path)
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
