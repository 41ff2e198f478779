"""Waits until the nodes of a job are in its Ray cluster: `python -m ctpo_megatron.cluster.members ADDRESS HOST ...`."""

from __future__ import annotations

import argparse
import logging
import sys
import time

import ray

POLL_S = 0.5


def main() -> int:
    """Returns 0 once as many nodes are alive as there are hosts, 1 after the time; then a line says which have joined."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="HOST:PORT of the cluster")
    parser.add_argument("hosts", nargs="+", help="names of the nodes")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds")
    given = parser.parse_args()
    deadline = time.monotonic() + given.timeout
    ray.init(address=given.address, log_to_driver=False, logging_level=logging.ERROR)
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) >= len(given.hosts):
            return 0
        if time.monotonic() > deadline:
            there = {node["NodeManagerHostname"] for node in alive}
            missing = [host for host in given.hosts if host not in there] or given.hosts
            print(
                f"error: {len(alive)} of {len(given.hosts)} nodes joined Ray in {given.timeout:.0f} s; not: {missing}",
                file=sys.stderr,
            )
            return 1
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
