"""Joining or starting Ray, and asking it for room."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from ctpo_megatron.cluster.lean_ray import HOLDS_THEIR_INPUT, without_idle_processes
from ctpo_megatron.cluster.loopback import LOOPBACK, on_loopback
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import CtpoError, InputError, NoRoom
from ctpo_megatron.models.rules import shared_prompts
from ctpo_megatron.models.shape import ModelShape

# Ray would run its actors, and the servers that they start, at niceness 15: anything else on the host would come before the run.
# It asks a process to end before it kills it: one that is stopped would hold its place for five seconds. An actor that ends would
# kill the server that it has started, which ends by itself when it loses the actor, and then leaves nothing in shared memory.
# Workers that it starts beforehand are one for each processor, and import Ray in vain: a run has few actors.
SETTINGS = {
    "prestart_worker_first_driver": False,
    "worker_niceness": 0,
    "kill_worker_timeout_milliseconds": 1000,
    "kill_child_processes_on_worker_exit": False,
}
ASK_EVERY_S = 0.1  # whether there is room; a question takes a millisecond
LOCAL_OBJECT_STORE = 2**30  # a CPU run's batches are small, and /dev/shm often is too


def connect(config: RunConfig, cpus: int) -> None:
    """Join the configured cluster, or start one on this host, of at least `cpus` CPUs, that ends with this process.

    Called in the main thread. Signal handlers stay the caller's: Ray's own would abort the process three seconds after SIGTERM.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _init(config, cpus)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _init(config: RunConfig, cpus: int) -> None:
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.cluster.address is not None:
        try:
            ray.init(address=config.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise InputError(
                f"cluster.address={config.cluster.address!r}: no Ray cluster answers there ({error}). "
                "Start one with `ray start --head`, or leave cluster.address out to start one for this run."
            ) from error
        return
    on_cpu = config.cluster.device != "cuda" and not sees_gpu()
    try:
        with on_loopback(), without_idle_processes():
            ray.init(
                address="local",  # otherwise it would look for a Ray that is here already, and join that
                num_cpus=max(os.cpu_count() or 1, cpus),
                object_store_memory=LOCAL_OBJECT_STORE if on_cpu else None,
                _node_ip_address=LOOPBACK,
                _system_config=SETTINGS | HOLDS_THEIR_INPUT,
                **quiet,
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system has said which file, and why
        raise CtpoError(_not_started(error)) from error


def _not_started(error: Exception) -> str:
    """Returns what to say where Ray could not start on this host. Ray raises a plain Exception, among others."""
    said = " ".join(str(error).split()).rstrip(".")
    return (
        f"Ray did not start on this host. It says: {said}. Ray waits 30 s for its own processes: see that the host has "
        "processors and memory left for them, then start again, with --resume where the run has a checkpoint. Ray's logs are "
        "in /tmp/ray/session_latest/logs."
    )


def resolve_device(config: RunConfig, shape: ModelShape) -> RunConfig:
    """`config` with `cluster.device` set to `cpu` or `cuda`, by what the cluster offers, and what hangs on it and the model's
    `shape`: train.share_prompts.

    Raises InputError when cuda is asked for and missing.
    """
    gpus = ray.cluster_resources().get("GPU", 0)
    wanted = config.cluster.device
    if wanted == "cuda" and not gpus:
        raise InputError("cluster.device=cuda, but the Ray cluster has no GPU; allowed here: cpu, auto")
    device = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    config.check_device(device)
    shared = shared_prompts(config.train.share_prompts, shape, device)
    cluster = config.cluster.model_copy(update={"device": device})
    return config.model_copy(update={"cluster": cluster, "train": config.train.model_copy(update={"share_prompts": shared})})


async def reserve(bundles: list[dict[str, float]], timeout_s: float) -> PlacementGroup:
    """A placement group for these processes of the run, or an error that says what is missing."""
    group = await try_reserve(bundles, timeout_s)
    if group is None:
        raise no_room(bundles, timeout_s)
    return group


async def try_reserve(bundles: list[dict[str, float]], timeout_s: float) -> PlacementGroup | None:
    """A placement group for these processes; None, and nothing is asked for any more, where there is no room in time."""
    group, deadline = placement_group(bundles, strategy="PACK"), time.monotonic() + timeout_s
    while (await asyncio.to_thread(placement_group_table, group))["state"] != "CREATED":
        if time.monotonic() > deadline:
            remove_placement_group(group)
            return None
        await asyncio.sleep(ASK_EVERY_S)
    return group


def no_room(bundles: list[dict[str, float]], waited_s: float) -> NoRoom:
    """What to say where Ray has no room for these processes."""
    needed = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
    offered = {kind: ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU")}
    return NoRoom(
        f"no room for the run's processes after {waited_s:.0f} s: {len(bundles)} processes need {needed}, the cluster has "
        f"{offered} and {ray.available_resources().get('CPU', 0)} CPUs, {ray.available_resources().get('GPU', 0)} GPUs free"
    )


def node_address(config: RunConfig) -> str:
    """The address on which processes of this node listen: the loopback in a cluster started for the run, else Ray's address."""
    if config.cluster.address is None:
        return LOOPBACK
    mine = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == mine)


def sees_gpu() -> bool:
    """Whether this node has an NVIDIA driver."""
    return os.path.exists("/dev/nvidiactl")
