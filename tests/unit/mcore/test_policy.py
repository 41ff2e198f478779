"""A rollout batch through a trainer rank: what is on the device, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.mcore import policy


class Shard:
    """Stands for a micro-batch: where it is, and the streams it was given."""

    def __init__(self, name: str, device: str = "host", **streams: Any) -> None:
        self.name, self.device, self.streams = name, device, streams

    def with_streams(self, **streams: Any) -> Shard:
        return Shard(self.name, self.device, **(self.streams | streams))


class Rank:
    """Says what it is asked, and that all of it is on its device."""

    scan = None

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
        return {policy.NONFINITE: 0}

    def train_step(self, placed: list[Shard], _loss: Any, _temperature: float) -> str:
        assert {each.device for each in placed} == {"device"}
        self.said.append(f"step {placed[0].name} against {placed[0].streams['anchor_logp']}")
        return placed[0].name


def test_the_device_holds_one_optimizer_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept from the old policy's pass to the step are shards in the host's memory; all log-probs come before a step."""
    monkeypatch.setattr(policy, "drift_stats", lambda *_: Stats())
    monkeypatch.setattr(policy, "anchor_logp", lambda _mb, old, *_: old)
    for name in ("raise_if_nonfinite", "check_drift", "algorithm_recipe"):
        monkeypatch.setattr(policy, name, lambda *_, **__: None)
    monkeypatch.setattr(policy, "merge_values", lambda steps: dict.fromkeys(steps))
    trained: list[list[Shard]] = []

    class Watched(Rank):
        def on_device(self, shards: list[Shard]) -> list[Shard]:
            trained.append(shards)
            return super().on_device(shards)

    rank: Any = Watched()
    algorithm: Any = SimpleNamespace(anchor="old", reference=None, objective=None, aggregation=None, correction=None)
    batches: Any = [[Shard("a")], [Shard("b")]]
    policy.update_policy(rank, batches, algorithm=algorithm, temperature=1.0, drift=Any, version=1)
    assert rank.said == ["logp a", "logp b", "step a against old a", "step b against old b"]
    assert [[each.device for each in shards] for shards in trained] == [["host"]] * 4
