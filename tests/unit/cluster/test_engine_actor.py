"""What the owner of a server does before it starts one on GPUs in the place of another, and which of its parts it blames."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.cluster.calls import Process
from ctpo_megatron.cluster.engines import actor, group
from ctpo_megatron.cluster.engines.actor import EngineActor
from ctpo_megatron.cluster.engines.group import EngineGroup
from ctpo_megatron.cluster.placement import ServerPlacement
from ctpo_megatron.cluster.teachers import TeacherServers, teacher_fleets
from ctpo_megatron.cluster.watch.watchdog import _action
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.errors import ProcessDied
from ctpo_megatron.record.events import discard
from ctpo_megatron.record.stalls import Verdict

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config_of(device: str) -> RunConfig:
    return load_config(CONFIGS / "qwen3-4b.yaml", [f"cluster.device={device}"])


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def waited(environment: Mapping[str, str]) -> None:
        found.append(f"waited for {environment['CUDA_VISIBLE_DEVICES']}")

    monkeypatch.setattr(actor, "redirect_output", lambda _log: None)
    monkeypatch.setattr(actor, "wait_for_gpus", waited)
    monkeypatch.setattr(actor, "SGLangServer", lambda *_args, **_options: found.append("started"))
    return found


@pytest.mark.parametrize(
    ("device", "again", "expected"),
    [
        ("cuda", True, ["waited for 2,3", "started"]),
        ("cuda", False, ["started"]),
        ("cpu", True, ["started"]),
    ],
)
def test_a_server_that_starts_again_waits_for_its_gpus(
    events: list[str], tmp_path: Path, device: str, again: bool, expected: list[str]
) -> None:
    EngineActor(config_of(device), 1, str(tmp_path / "log"), "key", ("2", "3")).launch(again=again)
    assert events == expected


def test_only_a_restart_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first start of a run waits for nothing."""
    launched: list[bool] = []
    call = SimpleNamespace(remote=lambda *_args, again=False: launched.append(again))
    handle = SimpleNamespace(launch=call, head=SimpleNamespace(remote=lambda: None))

    class Remote:
        def options(self, **_options: Any) -> Any:
            return SimpleNamespace(remote=lambda *_args: handle)

    monkeypatch.setattr(group.ray, "remote", lambda **_options: lambda _class: Remote())
    servers = EngineGroup(config_of("cuda"), tmp_path, "key", [ServerPlacement(({},))], Fleet(patience_s=1.0))
    servers._launch(0, 1)
    assert launched == [False, True]


def test_servers_of_a_teacher_name_its_own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """How long a start may take, and how often one is made after a death or a hang."""
    teachers = (
        "{name: near, type: copied, path: m, sources: [train]}",
        "{name: far, type: started, path: m, engine: {restarts: 0}}",
    )
    config = load_config(CONFIGS / "qwen3-4b.yaml", [f"algorithm.distillation.teachers=[{', '.join(teachers)}]"])
    given: dict[str, Any] = {}
    call = SimpleNamespace(remote=lambda *_args, **_options: None)
    handle = SimpleNamespace(launch=call, head=call)

    def remote(*args: Any) -> Any:
        given["section"] = EngineActor(*args)._section
        return handle

    monkeypatch.setattr(actor, "redirect_output", lambda _log: None)
    made = SimpleNamespace(options=lambda **_options: SimpleNamespace(remote=remote))
    monkeypatch.setattr(group.ray, "remote", lambda **_options: lambda _class: made)
    fleets, places = teacher_fleets(config, discard), [[ServerPlacement(({},))]]
    servers = TeacherServers(config, tmp_path, "key", places, fleets, nursery="", environment={}, watchdog=None)
    (launched,) = servers._groups[0]._servers
    section = "algorithm.distillation.teachers[1].engine"
    assert given["section"] == section
    (hung,) = launched.watched
    hung.hung = lambda _words: None
    verdict = Verdict("hung", (), (hung.process.name,), "")
    assert _action(verdict, [hung]) == f"The server is given up, and started again while {section}.restarts allows it."
    fleets[1].lose(fleets[1].join("server", "http://127.0.0.1:1", 1), "it died")
    assert f"({section}.restarts = 0)" in fleets[1].report()


def test_the_part_that_died_is_named_though_the_other_is_seen_first(tmp_path: Path) -> None:
    """All parts of a server die together: those that lost their connection are looked at a moment longer."""

    async def watch() -> None:
        loop = asyncio.get_running_loop()

        def part(rank: int, end: str, after_s: float) -> Process:
            ended: Future[None] = Future()
            loop.call_later(after_s, ended.set_exception, ProcessDied(end))
            call = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: ended))
            actor = SimpleNamespace(watch=SimpleNamespace(options=lambda **_options: call))
            return Process(f"inference server 0, node {rank}", actor, tmp_path / f"{rank}.log")

        parts = [part(0, "RuntimeError: Connection closed by peer", 0.0), part(1, "it has lost a scheduler", 0.2)]
        await group._Server("inference server 0", parts, [], []).watch()

    with pytest.raises(ProcessDied, match="inference server 0, node 1: it has lost a scheduler"):
        asyncio.run(watch())
