"""A rehearsed step beside the plan."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.topology import planned_run
from ctpo_megatron.planning.memory import StageMemory
from ctpo_megatron.planning.rehearsal import (
    FEW,
    PARTS,
    Part,
    compare,
    not_rehearsed,
    rehearsed_micro_batches,
    rehearsed_tokens,
)
from ctpo_megatron.planning.run import PlannedRun

CONFIGS = Path(__file__).parents[3] / "configs"
GIB = 2**30


def memory() -> StageMemory:
    """A power of two for each part, so that no sum of some is a sum of others."""
    return StageMemory(**{field.name: 2**number for number, field in enumerate(fields(StageMemory))})


def run_of(name: str, *overrides: str) -> PlannedRun:
    return planned_run(load_config(CONFIGS / name, list(overrides)))


def test_parts_are_compared_with_their_own() -> None:
    planned = memory()
    rehearsed = {"weights": 10, "gradients": 20, "optimizer": 30, "batch": 40, "step": 50}
    parts = {part.name: part for part in compare(planned, rehearsed)}
    assert list(parts) == [*rehearsed, "together"]
    assert parts["weights"] == Part("weights", planned.weights, 10)
    assert parts["batch"].planned == planned.replay + planned.micro_batches
    assert parts["step"].planned == planned.activations + planned.working + planned.head
    assert parts["step"].difference == 50 - parts["step"].planned
    assert parts["together"].rehearsed == 150
    assert parts["together"].planned + sum(not_rehearsed(planned).values()) == planned.total


def test_every_part_of_the_plan_is_compared_once_or_named() -> None:
    shown = [name for names in PARTS.values() for name in names]
    assert len(shown) == len(set(shown))
    assert {*shown, *not_rehearsed(memory())} == {field.name for field in fields(StageMemory)}
    assert not_rehearsed(replace(memory(), reserve=0)).keys() == not_rehearsed(memory()).keys() - {"reserve"}


@pytest.mark.parametrize(
    ("planned", "rehearsed", "near"),
    [
        (10 * GIB, 11 * GIB, True),
        (10 * GIB, 9 * GIB, True),
        (10 * GIB, 11 * GIB + 2**20, False),
        (10 * GIB, 9 * GIB - 2**20, False),
        (0, FEW, True),
        (0, FEW + 1, False),
    ],
)
def test_a_tenth_or_a_few_bytes_are_near(planned: int, rehearsed: int, near: bool) -> None:
    assert Part("step", planned, rehearsed).is_near is near


@pytest.mark.parametrize(
    ("overrides", "planned", "rehearsed"),
    [
        ([], 64, 2),
        ([], 1, 1),
        (["parallel.pp=4"], 64, 4),
        (["parallel.pp=4"], 3, 3),
        (["parallel.pp=4", "parallel.vpp=2"], 64, 8),
        (["parallel.pp=4", "parallel.vpp=2"], 4, 4),
    ],
)
def test_micro_batches_fill_the_pipeline(overrides: list[str], planned: int, rehearsed: int) -> None:
    assert rehearsed_micro_batches(run_of("qwen3-4b.yaml", *overrides), planned) == rehearsed


def test_tokens_can_be_shared_out() -> None:
    assert rehearsed_tokens(run_of("qwen3-4b.yaml")) == 12288
    assert rehearsed_tokens(run_of("qwen3-4b.yaml", "train.max_tokens_per_micro_batch=12003")) == 12000
