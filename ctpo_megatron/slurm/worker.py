"""A node that is not the first of its job: Ray, until the input of this process ends. `python -m ctpo_megatron.slurm.worker`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from ctpo_megatron.errors import CtpoError
from ctpo_megatron.slurm.first_node import requeue_without_first
from ctpo_megatron.slurm.limits import raise_limits
from ctpo_megatron.slurm.orders import END, Orders
from ctpo_megatron.slurm.ray_node import RayNode, my_address

POLL_S = 0.5


def main() -> int:
    """Returns 0 when the end was asked for, 1 where Ray did not start or ended by itself."""
    parser = argparse.ArgumentParser(prog="python -m ctpo_megatron.slurm.worker", description=__doc__)
    parser.add_argument("--address", required=True, help="HOST:PORT of the first node's Ray")
    parser.add_argument("--first", help="name of the first node, in a job that goes on without a lost node")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    raise_limits()
    looked = False

    def look() -> None:
        nonlocal looked
        if not looked and given.first is not None and "SLURM_JOB_ID" in os.environ:
            looked = True
            requeue_without_first(os.environ["SLURM_JOB_ID"], given.first, given.address)

    try:
        try:
            return _work(given.address, look)
        finally:
            look()  # the end may come before Ray is up
    except CtpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _work(head: str, look: Callable[[], None]) -> int:
    """Returns what `main` does. `look`: at the job, before Ray is closed, as SLURM may leave little time."""
    orders = Orders()
    with RayNode(head, my_address(head), is_head=False) as ray:
        signal.signal(signal.SIGTERM, lambda *_: orders.end())
        code = _until_end(ray, head, orders)
        look()
        return code


def _until_end(ray: RayNode, head: str, orders: Orders) -> int:
    """Returns 0 when the end of Ray here was asked for, 1 where it ended by itself."""
    while not ray.ended:
        if orders.next(POLL_S) == END:
            return 0
    if orders.next(5.0) == END:  # the first node's Ray ended, and with it this one: that is how a run may end
        return 0
    print(f"error: Ray ended on this node, {my_address(head)}. It said:\n{ray.said()}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
