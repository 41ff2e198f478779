"""The text of a job file. launch/ctpo.sbatch does the work inside the allocation; nothing here asks SLURM."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.errors import InputError
from ctpo_megatron.planning.topology import NodeCount, Topology
from ctpo_megatron.slurm.site import Site

SCRIPT = "ctpo.sbatch"


@dataclass(frozen=True, slots=True)
class Job:
    """A run on its way to SLURM: its name, where its processes are, and the words that `ctpo train` is given.

    `elastic`: its trainer may go on with fewer ranks.
    """

    name: str
    topology: Topology
    config: Path
    overrides: list[str]
    nodes: int | None = None  # None: as few as hold all GPUs, and the site's spare ones
    elastic: bool = False


def render(job: Job, site: Site, launch: Path, *, source: str | None = None) -> str:
    """Returns the text of a job file for `job` with the options of `site`.

    `launch` is the project's launch directory, `source` the file that `site` was read from. Raises InputError when `launch` lacks
    the job's script, or the nodes asked for hold too few GPUs.
    """
    script = launch / SCRIPT
    if not script.is_file():
        raise InputError(f"{script}: no such file. `ctpo slurm` needs the project's launch directory, as in a git checkout.")
    nodes, words = _nodes(job, site)
    options = [f"#SBATCH {option}" for option in _options(job, nodes, site)]
    command = shlex.join(["bash", str(script.resolve()), *_script_options(job, site), "--", str(job.config), *job.overrides])
    lines = [
        "#!/bin/bash",
        f"# {words}",
        *([f"# Site options: {source}"] if source else []),
        *options,
        "",
        *(f"module load {module}" for module in site.modules),
        *site.environment,
        *([""] if site.modules or site.environment else []),
        f"exec {command}",
        "",
    ]
    return "\n".join(lines)


def _options(job: Job, nodes: int, site: Site) -> list[str]:
    named = {
        "job-name": re.sub(r"[^\w.-]+", "-", job.name),
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": site.gpus_per_node or None,
        "time": site.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "mail-user": site.mail_user,
        "mail-type": site.mail_type if site.mail_user else None,
        "output": "slurm-%j.out",
        "open-mode": "append",  # a job that is requeued goes on in the same file
        "signal": f"B:USR1@{site.signal_lead}",
    }
    found = [f"--{key}={value}" for key, value in named.items() if value is not None]
    # mem=0: all of a node's memory, of which --exclusive alone gives the partition's default share
    found += ["--exclusive", "--mem=0"] if site.exclusive else []
    found += ["--requeue" if site.requeue else "--no-requeue"]
    # a run that can do without a node is not ended with it
    found += ["--no-kill"] if _survives(job, site) else []
    return found + [option if option.startswith("-") else f"--{option}" for option in site.sbatch]


def _survives(job: Job, site: Site) -> bool:
    """Whether the run may go on when a node is lost that is not the first."""
    return job.elastic or site.spare_nodes > 0


def _script_options(job: Job, site: Site) -> list[str]:
    found = [f"--starts={site.starts}", *([] if site.preflight else ["--no-preflight"])]
    found += ["--no-kill"] if _survives(job, site) else []
    if site.container is not None:
        container = {"image": site.container.image, "workdir": site.container.workdir}
        container["mounts"] = ",".join(site.container.mounts) or None
        found += [f"--srun=--container-{key}={value}" for key, value in container.items() if value is not None]
    return found


def _nodes(job: Job, site: Site) -> tuple[int, str]:
    """Returns how many nodes to ask for, and a sentence about what is on them."""
    topology, per_node, spare = job.topology, site.gpus_per_node, site.spare_nodes
    beside = f"; {spare} spare" if spare else ""
    if per_node == 0:
        nodes = job.nodes or 1
        words = (
            f"{job.name}: {topology.ranks} trainer ranks and {topology.servers} servers on the CPUs of {_count(nodes)}{beside}"
        )
        return nodes + spare, words
    if topology.server_tp_per_node > per_node:
        raise InputError(
            f"rollout.engine.tp={topology.server_tp} on rollout.engine.nodes={topology.server_nodes} does not fit on nodes of "
            f"{per_node} GPUs; let each server spread over {-(-topology.server_tp // per_node)} nodes"
        )
    fewest = topology.node_count(per_node)
    taught = f", teachers: {topology.teacher_gpus}" if topology.teachers else ""
    if job.nodes is not None and job.nodes < fewest.all:
        raise InputError(
            f"--nodes {job.nodes} with {per_node} GPUs each hold {job.nodes * per_node} GPUs; the run needs "
            f"{topology.gpus} (parallel: {topology.ranks}, servers: {topology.server_gpus}{taught}), at least {fewest.all} nodes"
        )
    words = f"{job.name}: {topology.gpus} GPUs{taught}. {_placement(topology, fewest)}{beside}"
    return (job.nodes or fewest.all) + spare, words


def _placement(topology: Topology, nodes: NodeCount) -> str:
    ranks, servers = f"{topology.ranks} trainer ranks", f"{topology.servers} servers of {topology.server_tp} GPUs"
    if not topology.servers or topology.shares_gpus:
        return f"{_count(nodes.all)}: {ranks}" + (f", and {servers} on the same GPUs" if topology.servers else "")
    more = f", {_count(nodes.teachers)} for teachers alone" if nodes.teachers else ""
    parts = [f"{_count(nodes.trainer)} for {ranks}", f"{_count(nodes.servers)} for {servers}"]
    return ", ".join(parts) + more + (f"; {nodes.both} of them for both" if nodes.both else "")


def _count(nodes: int) -> str:
    return f"{nodes} node{'s' if nodes != 1 else ''}"
