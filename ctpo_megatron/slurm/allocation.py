"""What SLURM gave the job that this process belongs to."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ctpo_megatron.slurm.commands import SlurmError, ask

END_TIMEOUT_S = 15.0  # it is asked for again and again
FIRST_PORT, PORTS = 20_000, 12_000  # below the range that the system takes ports of outgoing connections from


@dataclass(frozen=True, slots=True)
class Allocation:
    """A job and its nodes. `restarts`: how often it was requeued."""

    job_id: int
    nodes: int
    node_list: str  # as SLURM writes it: n[1-4]
    restarts: int

    @property
    def port(self) -> int:
        """Returns the port at which this job's Ray is reached on the first node; another job on that node has another one."""
        return FIRST_PORT + self.job_id % PORTS

    @property
    def preflight_port(self) -> int:
        """Returns the port at which the tasks of this job's preflight meet on the first node."""
        return FIRST_PORT + (self.job_id + PORTS // 2) % PORTS


def allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Returns the job that a process with this `environment` belongs to; None outside of SLURM."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return None
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    restarts = environment.get("SLURM_RESTART_COUNT", "0")  # unset in a job's first run
    return Allocation(int(job), int(nodes), environment.get("SLURM_JOB_NODELIST", ""), int(restarts))


def end_time(job: Allocation, environment: Mapping[str, str]) -> float | None:
    """Returns when SLURM will end the job, in seconds since 1970; None where it has no limit.

    Raises SlurmError where SLURM does not say, as in a container without its commands. SLURM 23.02 and newer say in the
    environment when it would have ended as it began; the limit may have been moved since.
    """
    format_as_seconds = {"SLURM_TIME_FORMAT": "%s"}
    words = ("squeue", "--noheader", f"--jobs={job.job_id}", "--format=%e")
    try:
        told = ask(*words, environment=format_as_seconds, timeout_s=END_TIMEOUT_S)
    except SlurmError:
        told = environment.get("SLURM_JOB_END_TIME", "")
        if not told:
            raise
    ends = [float(word) for word in told.split() if word.isdigit()]  # one for each part of a heterogeneous job
    return min(ends, default=None)


def hosts(job: Allocation) -> list[str]:
    """Returns the names of the job's nodes; the first is where its batch script runs. Raises SlurmError."""
    return ask("scontrol", "show", "hostnames", job.node_list).split()


def address_of(host: str) -> str:
    """Returns the IPv4 address at which the other nodes reach `host`, as SLURM itself knows it. Raises SlurmError or OSError."""
    record = ask("scontrol", "show", "node", "--oneliner", host)
    name = next((word.partition("=")[2] for word in record.split() if word.startswith("NodeAddr=")), host)
    return socket.gethostbyname(name)
