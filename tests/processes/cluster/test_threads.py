"""Threads in a process of their own: what torch computes with, what is inherited, and that binding holds for each."""

from __future__ import annotations

import subprocess
import sys


def test_torch_and_the_environment_agree() -> None:
    code = "import os; from ctpo_megatron.cluster.threads import set_threads; set_threads(3); import torch; "
    code += "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], os.environ['THP_MEM_ALLOC_ENABLE'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["3", "3", "1"]


def test_binding_holds_for_all_threads_and_those_to_come() -> None:
    code = "import os, threading; from ctpo_megatron.cluster.threads import bind_to_cores; first = min(os.sched_getaffinity(0)); "
    code += "held = threading.Event(); early = threading.Thread(target=held.wait); early.start(); bind_to_cores({first}); "
    code += "late = threading.Thread(target=held.wait); late.start(); "
    code += "print(all(os.sched_getaffinity(int(t)) == {first} for t in os.listdir('/proc/self/task'))); held.set()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True"]
