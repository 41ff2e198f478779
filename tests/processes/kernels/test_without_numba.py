"""Trainer ranks where numba is missing, as on GPUs: nothing imports it, and on CPUs layers go the portable way."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch
from ctpo_megatron.mcore.host import prepare_host
prepare_host("cpu")
import ctpo_megatron.mcore.rank, ctpo_megatron.mcore.step
from ctpo_megatron.mcore.model import compiled
print([name for name in ("numba", "llvmlite") if name in sys.modules])
compiled.importlib.util.find_spec = lambda name: None
x, norm = torch.randn(3, 32), compiled.RMSNorm.__new__(compiled.RMSNorm)
torch.nn.Module.__init__(norm)
norm.eps, norm.weight = 1e-6, torch.nn.Parameter(torch.ones(32))
print(torch.equal(norm(x), torch.nn.functional.rms_norm(x, (32,), norm.weight, 1e-6)), "numba" in sys.modules)
"""


def test_it_is_imported_when_a_layer_on_a_cpu_wants_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[]", "True False"]
