"""What is started before anything else of a run, since it takes longest and waits for nobody."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.nursery import Nursery
from ctpo_megatron.engine.server_args import server_env
from ctpo_megatron.models.threads import hidden_size_in

GPU_DRIVER = "/dev/nvidiactl"


@contextlib.contextmanager
def opened_nursery(config: RunConfig) -> Iterator[Nursery | None]:
    """Context with the process that servers are forked from; None where they are on GPUs, or on hosts of a cluster.

    Nothing heavy is imported here.
    """
    device = config.cluster.device
    on_cpu = device == "cpu" or (device == "auto" and not os.path.exists(GPU_DRIVER))
    if not on_cpu or config.cluster.address is not None:
        yield None
        return
    env = server_env(
        config.rollout.engine, device="cpu", alone=config.servers_alone, hidden_size=hidden_size_in(config.model.path)
    )
    with contextlib.closing(Nursery(env)) as nursery:
        yield nursery
