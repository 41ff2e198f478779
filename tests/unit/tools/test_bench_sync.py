"""The arithmetic of tools/bench_sync.py; nothing is measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ctpo_megatron.mcore.host import ABSENT_ON_CPU

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ABSENT_ON_CPU:  # as in a trainer rank; they are most of the time that importing megatron takes
        monkeypatch.setitem(sys.modules, name, None)
    return importlib.import_module("bench_sync")


@pytest.mark.thorough
def test_ratios_are_taken_within_each_repeat(bench: ModuleType) -> None:
    """Medians of the times themselves would give 4 s / 10 s = 0.4."""
    rows = []
    for repeat, (bare_s, update_s) in enumerate([(1.0, 2.0), (4.0, 10.0), (9.0, 10.0)]):
        rows.append({"repeat": repeat, "way": "bare", "what": "full", "bytes": 100, "transfer": bare_s})
        rows.append({"repeat": repeat, "way": "ready-made", "what": "full", "bytes": 100, "update": 4 * bare_s})
        full = {"bytes": 100, "prepare": update_s, "update": update_s, "paused": 2 * update_s}
        full |= {"attestation": 1.0, "memory": 30, "bucket": 20}
        rows.append({"repeat": repeat, "way": "broadcast", "what": "full", **full})
        rows.append({"repeat": repeat, "way": "colocated", "what": "full", **full, "update": update_s / 2, "memory": 20})
        for way in ("broadcast", "colocated"):
            rows.append({"repeat": repeat, "way": way, "what": "delta", **full, "update": 0.1, "paused": update_s / 2})
    found = bench.ratios(rows)
    own = {"bandwidth": 0.5, "whole": 0.25, "attestation": 0.05, "memory": 1.5, "delta": 0.25}
    colocated = {"bandwidth": 1.0, "whole": 1 / 3, "attestation": 0.05, "memory": 1.0, "delta": 0.25}
    assert found == pytest.approx({"server": 0.25, **own, **{f"colocated {name}": value for name, value in colocated.items()}})
    assert [check.holds for check in bench.checks(found)] == [False, True, True, True, True]
    worst = {"bandwidth": 0.7, "colocated bandwidth": 0.89, "delta": 0.31, "attestation": 0.11, "memory": 2.1}
    assert [check.holds for check in bench.checks(worst)] == [True, False, False, False, False]
