"""Joining the servers' update groups over backends that block or fail: every wait ends, and the servers at fault are named."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.config.weights import BroadcastTransport
from ctpo_megatron.engine import update_group
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.protocol import Server
from ctpo_megatron.weights.transports.broadcast import BroadcastSender
from tests.support.willing_server import willing_server

CPU = torch.device("cpu")
JOIN, LEAVE, LOAD = "/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_distributed"


class Done(dist.Work):
    """A collective that is over, well or badly."""

    def __init__(self, problem: str = "") -> None:
        super().__init__()
        self._problem = problem

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        if self._problem:
            raise RuntimeError(self._problem)
        return True


class LazyGroup(dist.ProcessGroup):
    """As NCCL's: made at once, connected in its first broadcast, which blocks until all have come or the group is given up."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        self._own_name = options.group_id
        self.come, self.given_up, self.abortable = threading.Event(), threading.Event(), threading.Event()
        self.abortable.set()
        self.broken = ""  # what is wrong with a broadcast
        self.sizes: list[int] = []

    def getBackendName(self) -> str:
        return "lazy"

    @property
    def group_name(self) -> str:
        return self._own_name

    def broadcast(self, tensors: list[torch.Tensor], _options: Any) -> dist.Work:
        self.sizes.append(tensors[0].nbytes)
        while not self.come.wait(0.01):
            if self.given_up.is_set():
                raise RuntimeError("the group was aborted")
        return Done(self.broken)

    def abort(self) -> None:
        self.abortable.wait(60)
        self.given_up.set()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LazyGroup]]:
    """The groups that were made; the next ones come from it in the place of gloo's."""
    made: list[LazyGroup] = []

    def new(options: Any, _backend_options: object) -> LazyGroup:
        made.append(LazyGroup(options))
        return made[-1]

    plugin = dist.Backend._BackendPlugin(new, True)
    monkeypatch.setitem(dist.Backend._plugins, "GLOO", plugin)
    monkeypatch.setattr("ctpo_megatron.engine.calls.VERDICT_WAIT_S", 0.3)
    monkeypatch.setattr("ctpo_megatron.weights.transports.broadcast.LEAVE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(update_group, "ABORT_TIMEOUT_S", 1.0)
    yield made
    for group in made:
        group.abortable.set()
        group.given_up.set()


def let_come(groups: list[LazyGroup], number: int) -> None:
    """The servers come into the group of that number soon after it is made."""

    def come() -> None:
        while len(groups) <= number:
            time.sleep(0.01)
        time.sleep(0.2)
        groups[number].come.set()

    threading.Thread(target=come, daemon=True).start()


def sender(timeout_s: float) -> BroadcastSender:
    return BroadcastSender(BroadcastTransport(timeout_s=timeout_s), device=CPU, address="127.0.0.1")


def refused(*urls: str, timeout_s: float = 1.5) -> tuple[WeightSyncError, float]:
    """The error of connecting to servers, and how many seconds it took to come."""
    trying, begin = sender(timeout_s), time.monotonic()
    with pytest.raises(WeightSyncError) as raised:
        trying.connect([Server(url) for url in urls], "key")
    seconds = time.monotonic() - begin
    trying.close()
    return raised.value, seconds


def test_a_communicator_is_built_when_servers_are_connected(groups: list[LazyGroup]) -> None:
    """One byte has gone round before `connect` returns; then buckets only. Each group has a name of its own."""
    with willing_server() as (url, asked):
        connecting = sender(20.0)
        let_come(groups, 0)
        connecting.connect([Server(url, 2)], "key")
        assert asked == ["/model_info", JOIN]
        assert (groups[0].sizes, groups[0].size()) == ([1], 3)
        connecting.send([[("a", torch.ones(3))]], 1)
        assert groups[0].sizes == [1, 12]
        let_come(groups, 1)
        connecting.connect([Server(url)], "key")
        assert asked == ["/model_info", JOIN, LOAD, LEAVE, "/model_info", JOIN]
        assert groups[0].given_up.is_set()
        connecting.close()


def test_a_sender_whose_turn_comes_too_late_says_so(groups: list[LazyGroup]) -> None:
    with willing_server() as (url, asked):
        late = sender(20.0)
        let_come(groups, 0)
        late.connect([Server(url)], "key")
        begun = len(asked)
        with pytest.raises(WeightSyncError, match="no time left for its group"):
            late.join(time.monotonic() - 0.5)
        assert len(asked) == begun, "no server is asked to wait"
        late.close()


def test_a_server_that_does_not_come_is_named(groups: list[LazyGroup]) -> None:
    """The first broadcast blocks for ever; it is given up at the deadline, and the server that has not answered is at fault."""
    with willing_server() as (good, _), willing_server(unanswered=[JOIN]) as (bad, _):
        error, seconds = refused(good, bad)
    assert error.servers == (bad,)
    assert "did not come into the group within weights.timeout_s=2 s" in str(error)
    assert 1.5 <= seconds < 8
    assert groups[0].given_up.is_set()


def test_a_server_that_refuses_is_named_at_once(groups: list[LazyGroup]) -> None:
    with willing_server() as (good, _), willing_server(refused=[JOIN]) as (bad, _):
        error, seconds = refused(good, bad, timeout_s=30.0)
    assert (error.servers, groups[0].given_up.is_set()) == ((bad,), True)
    assert seconds < 8


def test_a_group_that_cannot_be_given_up_is_left_behind(groups: list[LazyGroup]) -> None:
    """Neither the broadcast nor the abort returns: the bound holds all the same, and the next group is made beside it."""
    connecting, begin = sender(1.5), time.monotonic()
    with willing_server() as (good, _), willing_server(unanswered=[JOIN]) as (bad, _):
        threading.Thread(target=hang_when_aborted, args=(groups,), daemon=True).start()
        with pytest.raises(WeightSyncError) as raised:
            connecting.connect([Server(bad)], "key")
        assert raised.value.servers == (bad,)
        assert time.monotonic() - begin < 8
        assert not groups[0].given_up.is_set(), "it still hangs"
        let_come(groups, 1)
        connecting.connect([Server(good)], "key")
        assert groups[1].sizes == [1]
        connecting.close()


def hang_when_aborted(groups: list[LazyGroup]) -> None:
    while not groups:
        time.sleep(0.01)
    groups[0].abortable.clear()


def test_a_broadcast_that_fails(groups: list[LazyGroup]) -> None:
    """As with a peer that is lost: it is an error of the broadcast, raised in the sender, and the group is given up."""
    with willing_server() as (url, _):
        connecting = sender(20.0)
        let_come(groups, 0)
        connecting.connect([Server(url)], "key")
        groups[0].broken = "the peer is lost"
        with pytest.raises(WeightSyncError, match="did not receive it: the peer is lost"):
            connecting.send([[("a", torch.ones(3))]], 1)
        assert groups[0].given_up.is_set()
        connecting.close()


def test_an_nccl_group_never_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made without a watchdog and with calls that can be aborted; the trainer's own groups keep what the user has set."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    made: dict[str, Any] = {}

    def new(options: Any, backend_options: Any) -> LazyGroup:
        made.update({name: os.environ.get(name) for name in update_group.NCCL_SETTINGS})
        made["blocking"], made["timeout"] = backend_options.config.blocking, backend_options._timeout
        return LazyGroup(options)

    monkeypatch.setitem(dist.Backend._plugins, "NCCL", dist.Backend._BackendPlugin(new, True))
    seconds = timedelta(seconds=7)
    group = update_group.join_update_group(dist.HashStore(), "g", world_size=3, backend="nccl", timeout=seconds)
    assert made == {
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "blocking": 0,
        "timeout": seconds,
    }
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ
    update_group.leave_update_group(group)


def test_the_installed_torch_reads_these_settings() -> None:
    """They are words of torch's library, which says there that a group with blocking waits has no watchdog."""
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cuda.so")
    if not os.path.exists(library):
        pytest.skip("torch is installed without CUDA")
    with open(library, "rb") as file:
        words = file.read()
    for word in (*update_group.NCCL_SETTINGS, "TORCH_NCCL_BLOCKING_WAIT is enabled, NO watchdog thread is created."):
        assert word.encode() in words
