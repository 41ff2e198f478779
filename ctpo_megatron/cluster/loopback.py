"""Lets a Ray cluster that is started for one run on one host listen on the loopback alone.

Ray 2.60 does so by itself on macOS and Windows, where a firewall would ask the user. On Linux `ray.init` puts the host's own
address in the place of a loopback address that it is given (`services.resolve_ip_for_localhost`), and its servers then listen on
every interface. The constant below makes the difference. tests/unit/cluster/test_loopback.py tells when this is no longer needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ray._private import ray_constants

LOOPBACK = "127.0.0.1"  # Ray compares texts: another address of the loopback does not count


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """While this context is open, Ray takes a loopback address as the address of this host."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
