"""A rollout batch through a trainer rank: what is on the device, and when."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.algorithms.statistics import NONFINITE
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.errors import MismatchError
from ctpo_megatron.mcore import old_policy, policy
from ctpo_megatron.mcore.old_policy import DRIFT
from ctpo_megatron.record.values import Max, Min, Sum


class Shard:
    """Stands for a micro-batch: where it is, and the streams it was given."""

    def __init__(self, name: str, device: str = "host", **streams: Any) -> None:
        self.name, self.device, self.streams = name, device, streams

    def with_streams(self, **streams: Any) -> Shard:
        return Shard(self.name, self.device, **(self.streams | streams))


class Rank:
    """Says what it is asked, and that all of it is on its device."""

    scan, drift = None, 0.5

    def __init__(self) -> None:
        self.said: list[str] = []

    def shard(self, batch: list[Shard]) -> list[Shard]:
        return batch

    def on_device(self, shards: list[Shard]) -> list[Shard]:
        return [Shard(each.name, "device", **each.streams) for each in shards]

    def logp(self, placed: list[Shard], temperature: float) -> list[str]:
        assert {each.device for each in placed} == {"device"}
        self.said.append(f"logp {placed[0].name}")
        return [f"old {each.name}" for each in placed]

    def reduce(self, _gaps: Any) -> dict[str, Any]:
        return dict.fromkeys(DRIFT, Max(0.0)) | {NONFINITE: Min(math.inf)}

    def train_step(
        self,
        placed: list[Shard],
        _loss: Any,
        _temperature: float,
        check: Any = None,
        *,
        warming_up: bool = False,
        more: bool = False,
    ) -> dict[str, Any]:
        assert not warming_up
        self.said += [] if more else ["last"]
        assert {each.device for each in placed} == {"device"}
        self.said.append(f"step {placed[0].name} against {placed[0].streams.get('anchor_logp', 'its own')}")
        values: dict[str, Any] = {"loss": Sum(1.0)}
        if check is not None:
            values |= dict.fromkeys(DRIFT, Max(self.drift))
            check(values)
            self.said.append("checked")
        return values


def updated(rank: Any, monkeypatch: pytest.MonkeyPatch, drift: DriftBounds, batches: str) -> Any:
    monkeypatch.setattr(old_policy, "drift_stats", lambda *_: Stats())
    monkeypatch.setattr(old_policy, "anchor_logp", lambda _mb, old, *_: old)
    monkeypatch.setattr(policy, "algorithm_recipe", lambda *_, **__: None)
    algorithm: Any = SimpleNamespace(
        anchor="old", reference=None, gae=None, critic=None, objective=None, aggregation=None, correction=None
    )
    made: Any = [[Shard(name)] for name in batches]
    return policy.update_policy(rank, made, algorithm=algorithm, temperature=1.0, drift=drift, version=1)


def test_the_first_optimizer_step_is_its_own_old_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' log-probs come before any step is applied, and the device holds one optimizer step's shards at a time."""
    moved: list[list[Shard]] = []

    class Watched(Rank):
        def on_device(self, shards: list[Shard]) -> list[Shard]:
            moved.append(shards)
            return super().on_device(shards)

    rank = Watched()
    found = updated(rank, monkeypatch, DriftBounds(), "abc")
    first = ["logp b", "logp c", "step a against its own", "checked"]
    assert rank.said == [*first, "step b against old b", "last", "step c against old c"], "weights are whole behind the last"
    assert [[each.device for each in shards] for shards in moved] == [["host"]] * 5
    assert found["drift/max"] == Max(0.5), "the first step's drift counts with that of the others"
    assert found["loss"] == Sum(3.0)


def test_one_optimizer_step_needs_no_pass_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank()
    updated(rank, monkeypatch, DriftBounds(), "a")
    assert rank.said == ["last", "step a against its own", "checked"]


def test_drift_beyond_its_bound_ends_the_update_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank()
    with pytest.raises(MismatchError, match="max"):
        updated(rank, monkeypatch, DriftBounds(max=0.1), "ab")
    assert rank.said == ["logp b", "step a against its own"]
