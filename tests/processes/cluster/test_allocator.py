"""What `keep_memory` does to a process, seen from the system's side."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from ctpo_megatron.cluster.allocator import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # the first ones do not fit into what others left, as malloc wants some bytes more to align them
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(kept, faults() - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def told(word: str, **more: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))} | more
    out = subprocess.run([sys.executable, "-c", CODE, word], env=environment, capture_output=True, text=True, check=True).stdout
    kept, faults = out.split()
    return kept, int(faults)


def test_large_tensors_get_the_memory_of_those_before() -> None:
    kept, few = told("keep")
    assert kept == "True"
    assert 20 * few < told("leave")[1], "pages that the system had to clear"


def test_the_users_own_word_wins() -> None:
    assert told("keep", MALLOC_ARENA_MAX="2")[0] == "False"
