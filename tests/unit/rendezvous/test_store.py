"""Where stores listen, and what the bridges to torch rest on."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from ctpo_megatron.ports import await_listener, free_port
from ctpo_megatron.rendezvous.store import join_store, serve_store

HOST, BOUND = "127.0.0.1", timedelta(seconds=20)


def addresses_of(port: int) -> set[str]:
    """The addresses at which this process listens at a port."""
    found = psutil.Process().net_connections("tcp")
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN and each.laddr.port == port}


def test_a_store_listens_at_its_address_alone() -> None:
    store = serve_store(HOST, timeout=BOUND)
    assert addresses_of(store.port) == {HOST}
    join_store(HOST, store.port, timeout=BOUND).set("key", "value")
    assert store.get("key") == b"value"
    port = store.port
    del store
    assert addresses_of(port) == set(), "it outlives its owner"


def test_who_comes_early_waits_until_somebody_listens() -> None:
    port, served = free_port(HOST), []
    timer = threading.Timer(0.2, lambda: served.append(serve_store(HOST, port, timeout=BOUND)))
    timer.start()
    try:
        await_listener(HOST, port, BOUND.total_seconds())
        with socket.create_connection((HOST, port), timeout=1.0):
            pass
        join_store(HOST, port, timeout=BOUND).set("key", "value")
    finally:
        timer.join()
    assert served[0].get("key") == b"value"


def test_who_waits_for_nobody_is_told_so_by_torch() -> None:
    with pytest.raises(RuntimeError, match=r"timed out|failed to connect"):
        join_store(HOST, free_port(HOST), timeout=timedelta(seconds=0.1))


def test_it_listens_at_the_port_that_is_asked_for() -> None:
    port = free_port(HOST)
    assert serve_store(HOST, port, timeout=BOUND).port == port


def test_a_port_that_is_taken_is_refused() -> None:
    store = serve_store(HOST, timeout=BOUND)
    with pytest.raises(OSError, match="in use"):
        serve_store(HOST, store.port, timeout=BOUND)


def test_torchs_own_stores_listen_everywhere() -> None:
    """Once they do not, rendezvous/store.py can go, and engine/sglang/store.py with it."""
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    assert addresses_of(store.port) & {"::", "0.0.0.0"}


def test_a_group_that_asks_for_a_store_takes_the_one_that_is_served() -> None:
    """What engine/sglang/store.py rests on: `init_process_group` listens nowhere else."""
    served = serve_store(HOST, timeout=BOUND, multi_tenant=True)
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{served.port}", rank=0, world_size=1, timeout=BOUND)
    try:
        assert served.num_keys() > 0
        assert addresses_of(served.port) == {HOST}
    finally:
        dist.destroy_process_group()


def test_a_prefix_is_no_lock() -> None:
    """docs/operations says so: who connects is told all keys."""
    store = serve_store(HOST, timeout=BOUND)
    dist.PrefixStore("secret", store).set("key", "value")
    assert join_store(HOST, store.port, timeout=BOUND).list_keys() == ["secret/key"]
