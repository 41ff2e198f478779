"""ratios.jsonl: what is due is written, what a run went back behind is taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.algorithms.density import BUCKETS, SIGNS
from ctpo_megatron.algorithms.health import POSITION_BINS
from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.loop.ratios import RatioFile, ratio_line
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.values import Mean, Sum


def stats() -> dict[str, Any]:
    """Three tokens at position 1 and two at 2 and 3, all in one bucket of a positive advantage; one was clipped."""
    counts = np.zeros((2, SIGNS, POSITION_BINS, BUCKETS))
    counts[:, 2, 0, 5], counts[:, 2, 1, 5] = 3, 2
    tokens, clipped = np.zeros(POSITION_BINS), np.zeros(POSITION_BINS)
    tokens[:2], clipped[1] = (3, 2), 1
    return {
        "health/density": Sum(counts.ravel()),
        "health/tokens": Sum(tokens),
        "health/clipped": Sum(clipped),
        "loss": Mean(1.0),
    }


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "ratios.jsonl").read_text().splitlines()]


def test_a_line_by_hand() -> None:
    line = ratio_line(7, stats())
    assert line is not None
    assert (line["step"], line["tokens"], line["clipped"]) == (7, {"1": 3.0, "2": 2.0}, {"1": 0.0, "2": 1.0})
    for kind in line["counts"]:
        assert kind[:2] == [{}, {}]
        assert {position: (row[5], sum(row)) for position, row in kind[2].items()} == {"1": (3, 3), "2": (2, 2)}
    assert json.loads(json.dumps(line)) == line


def test_a_run_that_is_not_of_rollouts_writes_none() -> None:
    assert ratio_line(1, {"loss": Mean(1.0)}) is None
    assert ratio_line(1, {name: Sum(np.zeros_like(value.total)) for name, value in stats().items() if name != "loss"}) is None


def test_a_run_that_went_back_writes_later_steps_anew(tmp_path: Path) -> None:
    for first, last in ((0, 6), (5, 8)):
        file = RatioFile(tmp_path, first_step=first)
        for step in range(max(first, 1), last + 1):
            file.write(step, stats() if step % 2 == 0 else {"loss": Mean(1.0)})
        file.close()
    assert steps(tmp_path) == [2, 4, 6, 8]


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6]), (0, None)])
def test_the_record_writes_what_is_due(tmp_path: Path, every: int, expected: list[int] | None) -> None:
    config = LogConfig(tensorboard=False, ratios_every=every)
    record = RunRecord(tmp_path, config, Recorder(tmp_path, config))
    for step in range(1, 8):
        record.ratios(step, stats())
    record.close()
    assert (steps(tmp_path) if (tmp_path / "ratios.jsonl").exists() else None) == expected
