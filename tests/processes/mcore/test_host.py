"""What a process on GPUs is given before it uses megatron, seen without a GPU: torch says that there is one, megatron is real."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import sys, torch
from ctpo_megatron.mcore import host

sys.modules.update(dict.fromkeys(("transformer_engine", *host.ABSENT_ON_CPU)))  # not to be imported
torch.compile = lambda function=None, **_: function or (lambda function: function)  # the compiler takes seconds to load
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, print
device = host.prepare_host("cuda")
from megatron.core.transformer.moe import moe_utils
print(device, moe_utils.HAVE_TE, moe_utils.te_general_gemm)
print(moe_utils.router_gating_linear(torch.ones(1, 2), torch.ones(3, 2), None, torch.float32).tolist())
print([name for name in host.ABSENT_AT_FIRST_ON_CPU if name not in sys.modules])
"""


def test_routers_work_on_gpus_without_transformer_engine() -> None:
    """They look up a name that only TransformerEngine defines, and do without it where it is None.

    What is hidden from megatron on CPUs it imports by itself: otherwise it need not be hidden.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["0", "cuda:0 False None", "[[2.0, 2.0, 2.0]]", "[]"], done.stderr
