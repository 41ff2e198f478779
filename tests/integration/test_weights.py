"""Weights on their way from Megatron ranks to real SGLang servers: what arrives, what a delta sends, and servers that fail."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.protocol import Server
from ctpo_megatron.weights.transports.broadcast import BroadcastSender
from ctpo_megatron.weights.transports.colocated import ColocatedSender
from tests.support.engines import HOST, RunningServer
from tests.support.hanging import stopped
from tests.support.tiny import write_model
from tests.support.weight_ranks import Case, Site
from tests.support.weight_sites import KINDS, check_publications, other_weights, serving, site_of, write_weights

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def running(model: Path, forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    """A server on two ranks and one on a single rank."""
    with serving([(model, 2), (model, 1)], tmp_path_factory.mktemp("servers"), forks) as servers:
        yield servers


@pytest.fixture
def site(running: list[RunningServer]) -> Site:
    return site_of(running)


def buckets(weights: dict[str, torch.Tensor], size: int = 12) -> list[list[tuple[str, torch.Tensor]]]:
    named = list(weights.items())
    return [named[at : at + size] for at in range(0, len(named), size)]


@pytest.mark.long
def test_every_layout_of_a_mixture(model: Path, site: Site, tmp_path: Path) -> None:
    base, started = write_weights(tmp_path / "base", other_weights(model, 1)), site.state()
    cases = [
        Case(model, base, site, layout, kinds)
        for layout, kinds in (
            ({"tp": 2, "dp": 2}, KINDS),
            ({"pp": 2, "dp": 2}, ("broadcast",)),
            ({"dp": 4, "ep": 2}, ("broadcast",)),
            ({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, ("broadcast",)),
            ({"pp": 2, "dp": 2, "ep": 2}, KINDS),
            ({"tp": 2, "pp": 2, "ep": 2}, KINDS),
        )
    ]
    check_publications(cases, [started] * len(cases), tmp_path)


@contextmanager
def silent_listener() -> Iterator[str]:
    """Accepts connections and never answers, as a process that hangs."""
    with socket.create_server((HOST, 0)) as listener:
        yield f"http://{HOST}:{listener.getsockname()[1]}"


def broadcaster(timeout_s: float) -> BroadcastSender:
    return BroadcastSender(BroadcastTransport(timeout_s=timeout_s), device=CPU, address=HOST)


def check_publication(sender: BroadcastSender, site: Site, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """It sends, and the servers hold what they would have loaded."""
    site.all("/begin_weight_update")
    sender.send(buckets(weights), 1)
    site.all("/end_weight_update")
    held = site.state()
    assert held == site.load(write_weights(directory, weights))


def test_servers_that_are_silent_hang_or_die(
    model: Path, running: list[RunningServer], site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is named within the bound, and the others are connected anew and served. The second server does not survive this."""
    monkeypatch.setattr("ctpo_megatron.weights.transports.sender.PROBE_TIMEOUT_S", 3.0)
    survivor, victim = site.servers
    sender = broadcaster(60)
    with silent_listener() as url:
        with pytest.raises(WeightSyncError, match=url) as raised:
            sender.connect([survivor, Server(url), victim], site.key)
        assert raised.value.servers == (url,)

    sender.connect(site.servers, site.key)
    check_publication(sender, site, other_weights(model, 2), tmp_path / "2")

    # its processes stop in the middle of the stream: only it is named, and the other is free again
    sender = reconnected(sender, 8, site)
    site.all("/begin_weight_update")
    with stopped(running[1]):
        begin = time.monotonic()
        with pytest.raises(WeightSyncError, match=r"weights\.timeout_s=8 s|in time") as raised:
            sender.send(buckets(other_weights(model, 3)), 2)
        assert raised.value.servers == (victim.url,), raised.value
        assert time.monotonic() - begin < 25
    sender = reconnected(sender, 60, site)
    site.all("/end_weight_update")
    check_publication(sender, site, other_weights(model, 4), tmp_path / "4")

    # it is killed while a bucket is under way to it
    site.all("/begin_weight_update")
    with stopped(running[1]):
        threading.Timer(1.0, os.killpg, (running[1].server.pid, signal.SIGKILL)).start()
        with pytest.raises(WeightSyncError, match=victim.url) as raised:
            sender.send(buckets(other_weights(model, 5)), 3)
        assert raised.value.servers == (victim.url,), raised.value
    alone = Site([survivor], site.key)
    sender = reconnected(sender, 60, alone)
    alone.all("/end_weight_update")
    check_publication(sender, alone, other_weights(model, 6), tmp_path / "6")
    sender.close()


def test_colocated_refuses_servers_elsewhere() -> None:
    sender = ColocatedSender(ColocatedTransport(), device=CPU, address="10.0.0.1")
    with pytest.raises(WeightSyncError, match=r"http://10\.0\.0\.2:30000 is not on") as raised:
        sender.connect([Server("http://10.0.0.1:30000"), Server("http://10.0.0.2:30000")], "key")
    assert raised.value.servers == ("http://10.0.0.2:30000",)


def reconnected(sender: BroadcastSender, timeout_s: float, site: Site) -> BroadcastSender:
    sender.close()
    again = broadcaster(timeout_s)
    again.connect(site.servers, site.key)
    return again
