"""The arithmetic of tools/bench_rollout.py; nothing is measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_rollout")


def played(seconds: float, cpu: float) -> dict[str, Any]:
    return {
        "tokens": 100,
        "seconds": seconds,
        "cpu": {"controller": cpu / 4, "server: scheduler": 3 * cpu / 4},
        "lengths": [1, 2, 3],
    }


def test_ratios_are_taken_between_neighbours(bench: ModuleType) -> None:
    """Medians of the rates themselves would give 20 / 10 = 2."""
    sides = [bench.Side(name, None, Path()) for name in ("older", "this")]
    for older, this in ((10.0, 2.5), (5.0, 5.0), (20.0, 5.0)):
        sides[0].rounds.append(played(older, 1.0))
        sides[1].rounds.append(played(this, 0.5))
    found = bench.row("tail-5M", sides)
    assert found["ratios"] == [4.0, 1.0, 4.0]
    assert (found["ratio"], found["cpu ratio"]) == (4.0, 2.0)
    assert found["this"]["tokens/s"] == 20.0
    assert found["this"]["cpu us/token"] == 5000.0
    assert found["older"]["cpu shares"] == {"controller": 0.25, "server: scheduler": 0.75}
    bench.show([found])
