"""Job files for SLURM. launch/ctpo.sbatch brings Ray up inside the allocation; nothing here needs Ray."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.errors import InputError
from ctpo_megatron.planning.topology import Topology


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """What the cluster wants to know that a run's configuration does not say."""

    nodes: int | None = None  # None: as few as hold all GPUs
    gpus_per_node: int = 8  # 0: a run on CPUs
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None


def render_sbatch(name: str, topology: Topology, config: Path, overrides: list[str], options: SlurmOptions, launch: Path) -> str:
    """The text of a job file called `name` that trains the configuration in the file `config` with `overrides`.

    `topology` is that of the run, `launch` the project's launch directory. Raises InputError when `launch` lacks the
    job's script, or the nodes asked for hold too few GPUs.
    """
    script = launch / "ctpo.sbatch"
    if not script.is_file():
        raise InputError(f"{script}: no such file. `ctpo slurm` needs the project's launch directory, as in a git checkout.")
    lines = {
        "job-name": re.sub(r"[^\w.-]+", "-", name),
        "nodes": _nodes(topology, options),
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": "slurm-%j.out",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in lines.items() if value is not None]
    command = shlex.join(["bash", str(script.resolve()), str(config), *overrides])
    return "\n".join(
        ["#!/bin/bash", *head, "#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --no-requeue", "", f"exec {command}", ""]
    )


def _nodes(topology: Topology, options: SlurmOptions) -> int:
    per_node = options.gpus_per_node
    if per_node == 0:
        return options.nodes or 1
    if topology.server_tp_per_node > per_node:
        raise InputError(
            f"rollout.engine.tp={topology.server_tp} on rollout.engine.nodes={topology.server_nodes} does not fit on nodes of "
            f"{per_node} GPUs; let each server spread over {-(-topology.server_tp // per_node)} nodes"
        )
    fewest = topology.nodes(per_node)
    if options.nodes is not None and options.nodes < fewest:
        raise InputError(
            f"--nodes {options.nodes} with {per_node} GPUs each hold {options.nodes * per_node} GPUs; the run needs "
            f"{topology.gpus} (parallel: {topology.ranks}, servers: {topology.server_gpus}), at least {fewest} nodes"
        )
    return options.nodes or fewest
