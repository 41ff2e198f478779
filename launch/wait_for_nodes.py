"""Waits until so many nodes have joined the Ray cluster at RAY_ADDRESS: wait_for_nodes.py NODES TIMEOUT_S."""

from __future__ import annotations

import logging
import sys
import time

import ray


def alive() -> int:
    """Nodes of the cluster; 0 while it is not up."""
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.CRITICAL, ignore_reinit_error=True)
    except ConnectionError:
        return 0
    return sum(node["Alive"] for node in ray.nodes())


def main(wanted: int, timeout_s: float) -> int:
    """Exit code: 0 when all have joined, 1 when time ran out."""
    deadline = time.monotonic() + timeout_s
    found = alive()
    while found < wanted and time.monotonic() < deadline:
        time.sleep(1.0)
        found = alive()
    print(f"wait_for_nodes: {found} of {wanted} nodes have joined", file=sys.stderr, flush=True)
    return int(found < wanted)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
