"""Job files for SLURM. launch/ctpo.sbatch brings Ray up inside the allocation; nothing here needs Ray."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import InputError


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """What the cluster wants to know that a run's configuration does not say."""

    nodes: int | None = None  # None: as few as hold all GPUs
    gpus_per_node: int = 8  # 0: a run on CPUs
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None


def gpus_needed(config: RunConfig) -> int:
    """GPUs of a run: one per trainer rank, `rollout.engine.tp` per inference server, unless servers use the trainer's."""
    servers = 0 if config.weights.type == "colocated" else config.rollout.engine.servers * config.rollout.engine.tp
    return config.parallel.world_size + servers


def render_sbatch(config: RunConfig, path: Path, overrides: list[str], options: SlurmOptions, launch: Path) -> str:
    """The text of a job file that trains `path` with `overrides`. `launch` is the project's launch directory.

    Raises InputError when `launch` lacks the job's script, or the nodes asked for hold too few GPUs.
    """
    script = launch / "ctpo.sbatch"
    if not script.is_file():
        raise InputError(f"{script}: no such file. `ctpo slurm` needs the project's launch directory, as in a git checkout.")
    lines = {
        "job-name": re.sub(r"[^\w.-]+", "-", config.name),
        "nodes": _nodes(config, options),
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": "slurm-%j.out",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in lines.items() if value is not None]
    command = shlex.join(["bash", str(script.resolve()), str(path), *overrides])
    return "\n".join(["#!/bin/bash", *head, "#SBATCH --exclusive", "#SBATCH --no-requeue", "", f"exec {command}", ""])


def _nodes(config: RunConfig, options: SlurmOptions) -> int:
    per_node = options.gpus_per_node
    if per_node == 0:
        return options.nodes or 1
    needed = gpus_needed(config)
    engine = config.rollout.engine
    if engine.tp_per_node > per_node:
        raise InputError(
            f"rollout.engine.tp={engine.tp} on rollout.engine.nodes={engine.nodes} does not fit on nodes of {per_node} GPUs; let "
            f"each server spread over {-(-engine.tp // per_node)} nodes"
        )
    fewest = -(-needed // per_node)
    if options.nodes is not None and options.nodes < fewest:
        raise InputError(
            f"--nodes {options.nodes} with {per_node} GPUs each hold {options.nodes * per_node} GPUs; the run needs {needed} "
            f"(parallel: {config.parallel.world_size}, servers: {needed - config.parallel.world_size}), at least {fewest} nodes"
        )
    return options.nodes or fewest
