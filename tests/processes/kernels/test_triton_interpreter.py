"""The Triton kernels in an interpreter of their own: interpreted where there is no GPU, and absent where Triton is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
PARITY = "tests/unit/kernels/test_triton.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason=f"{PARITY} itself runs them as compiled")
def test_the_kernels_are_what_torch_computes() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", PARITY]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d{2,} passed", done.stdout)
    assert "skipped" not in done.stdout


def test_the_package_is_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import ctpo_megatron.kernels.triton, ctpo_megatron.algorithms, ctpo_megatron.parallel\n"
        "assert not [name for name in sys.modules if name.startswith('ctpo_megatron.kernels.triton.')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
