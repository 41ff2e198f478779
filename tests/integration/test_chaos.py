"""The short form of `make chaos`: four of its faults, and all that has to hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

FAULTS, STEPS = 4, 30  # a phase that lasts a tenth of a second may take some steps to be met
pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(900)]


def test_a_run_survives_what_comes(tmp_path: Path) -> None:
    words = [str(ROOT / "tools" / "chaos.py"), f"--faults={FAULTS}", f"--steps={STEPS}", "--no-taught", "--run-dir", "chaos"]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, timeout=800, check=False)
    found = json.loads((tmp_path / "chaos" / "chaos.json").read_text()) if ended.returncode in (0, 1) else {}
    assert ended.returncode == 0, f"{found.get('holds')}\n{ended.stdout}\n{ended.stderr}"
    assert {each["signal"] for each in found["faults"]} == {"KILL", "STOP"}
    assert len(found["faults"]) == FAULTS
    assert all(each["holds"] for each in found["holds"].values())
