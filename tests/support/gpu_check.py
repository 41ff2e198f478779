"""tools/gpu_check.py for tests: run as a program, and its files imported."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ctpo_megatron.mcore.host import ABSENT_ON_CPU

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


def import_from_tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of the tool's files; those about a trainer rank import Megatron as such a rank does."""
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ABSENT_ON_CPU:
        monkeypatch.setitem(sys.modules, name, None)
    return importlib.import_module


def run_gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TOOLS / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
