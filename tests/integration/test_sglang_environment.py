"""What NCCL reads in a server, after SGLang has set what it sets by itself, is what it reads in the trainer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ctpo_megatron.engine.sglang.imports import (
    ABSENT_AT_FIRST,
    ABSENT_IN_SERVERS,
    ABSENT_IN_SERVERS_ON_CPU,
    ABSENT_ON_CPU,
    LATER,
)
from ctpo_megatron.environment import environment_of

pytestmark = pytest.mark.integration

# SGLang's own function, on a fabric of several nodes, where it sets most; prints what NCCL would read afterwards in each case
SGLANG_SETS = """
import importlib, json, os, sys
from sglang.srt.entrypoints import engine

before = [name for name in sys.argv[1:] if name.startswith("sglang.") and name in sys.modules]
for name in sys.argv[1:]:
    if name.startswith("sglang."):
        importlib.import_module(name)

class Arguments:
    nnodes = 2
    dcp_size = 1
    def __init__(self, words):
        self.enable_symm_mem = "--enable-symm-mem" in words
        self.enable_nccl_nvls = "--enable-nccl-nvls" in words
    def __getattr__(self, name):
        return None

engine.resolving_view = engine.resolved_view = lambda arguments: arguments
engine.is_mnnvl_fabric_device = lambda: True
engine.attention_backends_of = lambda _: ()
engine.set_ulimit = lambda: None
found = []
for words, given in json.load(sys.stdin):
    for name in [name for name in os.environ if name.startswith("NCCL_")]:
        del os.environ[name]
    os.environ.update(given)
    engine._set_envs_and_config(Arguments(words))
    found.append({name: value for name, value in os.environ.items() if name.startswith("NCCL_")})
print(json.dumps({"variables": found, "loaded": [name for name in sys.argv[1:] if sys.modules.get(name)],
    "before": before}))
"""
CASES: list[tuple[tuple[str, ...], dict[str, str]]] = [  # rollout.engine.extra_args, what the user has set
    ((), {}),
    ((), {"NCCL_CUMEM_ENABLE": "1", "NCCL_IB_HCA": "mlx5"}),
    (("--enable-symm-mem",), {}),
    (("--enable-nccl-nvls",), {"NCCL_NVLS_ENABLE": "1"}),
]


@pytest.mark.timeout(300)
def test_nccl_reads_the_same_in_a_server_and_in_the_trainer() -> None:
    """After SGLang has set what it sets by itself."""
    given = [(words, environment_of("server", "cuda", user, engine_args=words)) for words, user in CASES]
    hidden = (*ABSENT_ON_CPU, *ABSENT_IN_SERVERS, *ABSENT_IN_SERVERS_ON_CPU, *ABSENT_AT_FIRST)
    by_itself = [*hidden, "torch._inductor.compile_fx", *LATER]
    command = [sys.executable, "-c", SGLANG_SETS, *by_itself]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] == by_itself, "what SGLang no longer imports by itself need not be hidden from it"
    assert found["before"] == [], "what SGLang imports at once need not be brought forward"
    for (words, user), server in zip(CASES, found["variables"], strict=True):
        trainer = environment_of("trainer", "cuda", user, engine_args=words)
        assert server == {name: value for name, value in trainer.items() if name.startswith("NCCL_")}
        assert {"NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"} <= server.keys()
