"""Threads of a trainer rank: what torch computes with in the process, and what processes below it inherit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ctpo_megatron.cluster.threads import threads_per_rank


def test_torch_and_the_environment_agree() -> None:
    code = "import os; from ctpo_megatron.cluster.threads import set_threads; set_threads(3); import torch; "
    code += "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], os.environ['THP_MEM_ALLOC_ENABLE'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["3", "3", "1"]


def test_ranks_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [threads_per_rank(ranks) for ranks in (1, 3, 8, 16)] == [8, 2, 1, 1]
