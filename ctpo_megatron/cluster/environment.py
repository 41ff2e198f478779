"""How the variables of `ctpo_megatron.environment` get to the processes of a run, on whichever node, and into its record.

The driver decides them, from the environment of the command, and Ray hands them to the actors on GPUs. What only the node knows,
the network interface of its address, the actor adds itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ctpo_megatron.config import RunConfig
from ctpo_megatron.environment import KERNELS, Reader, check_environment, environment_of, in_force, variables
from ctpo_megatron.errors import InputError, storing

RECORD = "environment.json"  # of a run that trains
EVALUATION_RECORD = "eval_environment.json"  # beside it, of one that does not


def decide(config: RunConfig, user: Mapping[str, str]) -> dict[Reader, dict[str, str]]:
    """What trainer ranks and servers are given. `config.cluster.device` is cpu or cuda; `user`: the environment of the command.

    Raises InputError for a value of the user's that the run cannot work with.
    """
    device, arguments = config.cluster.device, config.rollout.engine.extra_args
    check_environment(user, device, arguments)
    shares = config.weights.shares_devices
    readers: tuple[Reader, ...] = ("trainer", "server")
    return {reader: environment_of(reader, device, user, shares_gpus=shares, engine_args=arguments) for reader in readers}


def ray_environment(device: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment of an actor on GPUs: what has to be set before its process loads torch, OpenMP or CUDA.

    On CPUs there is none. Ray would start each such process twice, and an agent for it. Trainer ranks set their variables before
    they import torch (`set_own`), and servers get theirs when they are started (`engine.server_args`).
    """
    return {} if device == "cpu" else {"env_vars": dict(given)}


def set_own(device: str, given: Mapping[str, str]) -> None:
    """Set the variables of this process that Ray has not set: `ray_environment`. Call it before anything imports torch."""
    if device == "cpu":
        os.environ.update(given)


def write_record(config: RunConfig, given: Mapping[Reader, Mapping[str, str]], path: Path) -> None:
    """Write to `path` what each kind of process was given, and why."""
    device, arguments = config.cluster.device, config.rollout.engine.extra_args
    record: dict[str, dict[str, dict[str, str]]] = {}
    for reader, of in given.items():
        ours = variables(reader, device, shares_gpus=config.weights.shares_devices, engine_args=arguments)
        reasons = {(each.name, each.value): each.why for each in ours}
        record[reader] = {
            name: {"value": value, "why": reasons.get((name, value), "set by the user")} for name, value in sorted(of.items())
        }
    with storing(path):
        path.write_text(json.dumps({"device": device} | record, indent=2) + "\n", encoding="utf-8")


def node_environment(device: str, address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What a process of the run lacks in its `environment` and only its node knows. `address`: this node's, in the run.

    gloo otherwise takes the address that the host name resolves to: the loopback on many systems, or another network. NCCL takes
    the first interface but the loopback. The user's own choice wins, for both.
    Raises InputError where compiled kernels would be kept in somebody else's directory.
    """
    if device != "cpu" and any(value.startswith(KERNELS) for value in environment.values()):
        make_private(Path(KERNELS))
    interface = interface_of(address)
    if interface is None:
        return {}
    chosen = {"GLOO_SOCKET_IFNAME": interface} | ({} if device == "cpu" else {"NCCL_SOCKET_IFNAME": f"={interface}"})  # = exactly
    return {name: value for name, value in chosen.items() if not environment.get(name)}


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address; None where none has it."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(each.address == address for each in addresses)), None)


def make_private(directory: Path) -> None:
    """Make a directory that only this user may write: what lies in it is loaded as code. Raises InputError where it is not so."""
    with contextlib.suppress(FileExistsError):  # a file, which is refused below
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"{directory} is not a directory that only you may write, and compiled kernels are loaded from there; remove it, or "
            "set TRITON_CACHE_DIR and the other variables of this kind (`ctpo doctor` lists them) to directories of your own"
        )


def log_line(reader: Reader, device: str, environment: Mapping[str, str]) -> str:
    """One line for a process's log: the variables that it has."""
    return "environment: " + " ".join(f"{name}={value}" for name, value in in_force(reader, device, environment).items())
