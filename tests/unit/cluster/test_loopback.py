"""A Ray of the run's own on the loopback; tests/integration/test_train.py looks at the sockets of whole runs."""

from __future__ import annotations

import pytest
from ray._private import services

from ctpo_megatron.cluster.loopback import LOOPBACK, on_loopback

ELSEWHERE = "203.0.113.9"


@pytest.fixture(autouse=True)
def _a_host_with_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _address: ELSEWHERE)


def test_ray_still_replaces_the_loopback() -> None:
    """Once it does not, cluster/loopback.py can go."""
    assert services.resolve_ip_for_localhost(LOOPBACK) == ELSEWHERE


def test_inside_it_ray_takes_the_loopback() -> None:
    with on_loopback():
        assert services.resolve_ip_for_localhost(LOOPBACK) == LOOPBACK
    assert services.resolve_ip_for_localhost(LOOPBACK) == ELSEWHERE
