"""The arithmetic of tools/bench_pipeline.py and tools/bench_controller.py; nothing is measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def step(at: float, tokens: float) -> dict[str, float]:
    """A line of metrics.jsonl."""
    times = {"time": at, "time/rollout": 1.0, "time/train": 2.0, "time/publish": 0.5}
    published = {"publish/paused": at / 100, "publish/total": 0.5}
    return {"rollout/sampled_tokens": tokens, "rollout/staleness_mean": 0.5, "rollout/staleness_max": 1, **times, **published}


def test_only_steps_between_the_ends_are_counted(tool: Any) -> None:
    """The first step takes 100 s, and the last one 1 s: neither is like those of a long run."""
    bench: ModuleType = tool("bench_pipeline")
    rows = [step(100, 10), step(110, 100), step(120, 300), step(121, 7)]
    found = bench.figures(rows, bench.Sizes(groups=2, steps=4, warm=1))
    assert found["tokens/h"] == 3600 * (100 + 300) * 2 * bench.GROUP_SIZE / 20
    assert found["seconds"] == [10, 10, 1]
    assert found["pause"] == pytest.approx([1.15, 1.2])
    ratios = bench.ratios_of([{"tokens/h": 3.0}, {"tokens/h": 4.0}], [{"tokens/h": 2.0}, {"tokens/h": 1.0}])
    assert ratios == [1.5, 4.0]
    bench.show({"older, synchronous": [found], "this, partial": [found]}, "older, synchronous")


def test_what_the_controller_took_is_held_against_its_bounds(tool: Any) -> None:
    bench, run = tool("bench_controller"), tool("bench_controller_run")
    points = [(0, 0, 100), (1000, 4, 110), (2000, 8, 112), (4000, 16, 113)]
    readings = [run.Reading(n, 30 * n, n / 100, cpu, rss, {}, {"journal": n, "HTTP": 3 * n}) for n, cpu, rss in points]
    found = bench.judge("memory", readings, 2000)
    assert found["share of a core"] == pytest.approx(0.4)
    assert found["ms per trajectory"] == pytest.approx(4)
    assert found["phases"] == pytest.approx({"journal": 1, "HTTP": 3})
    assert found["growth"] == pytest.approx(113 / 112 - 1)
    assert found["missed"] == []
    grown = [*readings[:-1], run.Reading(4000, 120_000, 40, 16, 130, {}, {})]
    assert "grew by 16.1%" in bench.judge("memory", grown, 2000)["missed"][0]
    assert "40.0% of a core" in bench.judge("share", readings, 2000)["missed"][0]
    assert run.phase_of(sys._getframe()) == "other"
