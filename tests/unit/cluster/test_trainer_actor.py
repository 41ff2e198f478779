"""The Ray shell around a trainer rank, without Ray: what it hands on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.models.shape import ModelShape
from tests.unit.cluster.test_runtime import DENSE, MIXTURE, config


@pytest.mark.parametrize(
    ("device", "shape", "drift", "bounds"),
    [
        ("cuda", DENSE, {}, DriftBounds(None, 0.05, 1000)),
        ("cuda", MIXTURE, {}, DriftBounds(None, 0.15, 1000)),
        ("cpu", MIXTURE, {}, DriftBounds(None, 1e-3, 1000)),
        ("cuda", MIXTURE, {"mean": None}, DriftBounds()),
        ("cuda", DENSE, {"mean": 0.2, "max": 3.0}, DriftBounds(3.0, 0.2)),
    ],
)
def test_a_step_is_judged_by_the_bounds_of_the_model(
    monkeypatch: pytest.MonkeyPatch, device: str, shape: ModelShape, drift: dict[str, float | None], bounds: DriftBounds
) -> None:
    """`auto` becomes a number where configuration, device and model meet."""
    asked: list[Any] = []
    monkeypatch.setattr("ctpo_megatron.mcore.policy.update_policy", lambda *_, **options: asked.append(options["drift"]) or {})
    run = config().model_dump() | {"cluster": {"device": device}, "drift": drift}
    actor = object.__new__(TrainerActor)  # its __init__ takes this process's output
    actor.config, actor.shape, actor.rank = type(config()).model_validate(run), shape, 0
    actor._result = SimpleNamespace(rank=SimpleNamespace(waited_s=lambda: 0.0), weights=None, reference=None, teachers={})
    actor.update([], [], 1)
    assert asked == [bounds]
