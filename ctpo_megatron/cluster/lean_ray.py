"""Lets a Ray cluster that is started for one run on one host start only the processes that the run uses.

`ray.init` of Ray 2.60 also starts an autoscaler, which has nothing to add to one host; a monitor of logs, whose one reader would
be the driver (`log_to_driver`); and the head of a dashboard that is turned off, for Ray's usage statistics, whose answer it
waits for. Together they cost two seconds of a processor at each start. `ray.init` has no words for this; `ray start` has
`--no-monitor` and `--include-log-monitor` for the first two. tests/unit/cluster/test_lean_ray.py tells when that has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray._private import node as ray_node


class LeanNode(ray_node.Node):
    """Ray's head node with its GCS, its raylet and the raylet's two agents alone."""

    def start_monitor(self) -> None:
        """Start no autoscaler."""

    def start_log_monitor(self) -> None:
        """Start nobody who reads the workers' logs."""

    def start_api_server(self, **_: Any) -> None:
        """Start no dashboard."""


@contextlib.contextmanager
def without_idle_processes() -> Iterator[None]:
    """While this context is open, `ray.init` starts a LeanNode."""
    before = ray_node.Node
    ray_node.Node = LeanNode
    try:
        yield
    finally:
        ray_node.Node = before
