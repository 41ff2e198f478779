"""Nodes that meet: a directory that is not shared, a clock that is wrong, a port that is taken, a node that does not come.

Two threads are two nodes. tests/integration/test_slurm.py has two real ones, which also add up numbers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctpo_megatron.ports import free_port
from ctpo_megatron.slurm.preflight import local, meeting, task
from ctpo_megatron.slurm.preflight.meeting import Meeting, clock, ports, shared_files
from ctpo_megatron.slurm.preflight.report import Finding

HOST = "127.0.0.1"


def on_two_nodes(part: Callable[[Meeting], Finding]) -> list[Finding]:
    address = f"{HOST}:{free_port(HOST)}"
    kept: list[Meeting] = []  # the first node serves the other's questions until it has all answers

    def node(rank: int) -> Finding:
        threading.current_thread().name = f"node {rank}"
        here = Meeting(address, rank, ["n1", "n2"], 20.0)
        kept.append(here)
        return part(here)

    with ThreadPoolExecutor(2) as nodes:
        return list(nodes.map(node, range(2)))


def test_a_run_directory_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SHOWS_WITHIN_S", 0.3)
    shared = on_two_nodes(lambda here: shared_files(here, tmp_path / "run"))
    assert [each.state for each in shared] == ["ok", "ok"]
    assert list((tmp_path / "run").iterdir()) == []
    own = on_two_nodes(lambda here: shared_files(here, tmp_path / str(here.rank)))
    assert [each.state for each in own] == ["bad", "bad"]
    assert "does not show what n2 wrote" in own[0].found


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [each.state for each in on_two_nodes(clock)] == ["ok", "ok"]
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + (60.0 if threading.current_thread().name == "node 1" else 0.0))
    found = on_two_nodes(clock)
    assert [each.state for each in found] == ["ok", "bad"]
    assert found[1].found == "+60.0 s from the first node's"


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        ray = f"{HOST}:{other.getsockname()[1]}"
        taken = on_two_nodes(lambda here: ports(here, ray, HOST))
    assert [each.state for each in taken] == ["bad", "ok"]
    assert taken[0].found == f"Ray's {ray} cannot be used: Address already in use"


def test_a_node_that_does_not_come_is_named_after_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "MEET_TIMEOUT_S", 0.5)
    monkeypatch.setattr(local.Imports.__init__, "__defaults__", ({},))
    place = task.Task(f"{HOST}:{free_port(HOST)}", f"{HOST}:{free_port(HOST)}", 0, ["n1", "n2"])
    verdict = task.examine(place, task.Wanted(tmp_path, (str(tmp_path),), on_gpus=False), {})
    assert verdict is not None
    assert (verdict.exit_code, verdict.sentence) == (2, "The run cannot start. n2: report.")
