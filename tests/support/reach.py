"""Who listens in a run: every listening socket of its processes, held against the table of those that may.

docs/operations has the same table for people: a row for each owner here.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}  # the last: IPv4 through a socket of IPv6, as gRPC makes them


@dataclass(frozen=True, slots=True)
class Owner:
    """A kind of process that may listen. `words`: in its command line. `most`: sockets of one such process."""

    name: str
    words: str
    most: int
    users: str
    """Who may use what listens there."""


OWNERS = (
    Owner("Ray's GCS", r"gcs_server", 1, "the token"),
    Owner("raylet", r"raylet/raylet", 2, "the token"),
    Owner("Ray's dashboard agent", r"ray::DashboardAgent|dashboard/agent\.py", 3, "the token; its metrics: anybody"),
    Owner("Ray's runtime environment agent", r"ray::RuntimeEnvAgent|runtime_env/agent/main\.py", 1, "the token"),
    Owner("Ray's dashboard head", r"dashboard/dashboard\.py", 1, "anybody, to read numbers"),
    Owner("trainer rank", r"ray::TrainerActor", 5, "Ray: the token; stores and gloo: anybody"),
    Owner("keeper", r"ray::KeeperActor", 1, "the token"),
    Owner("engine actor", r"ray::EngineActor", 1, "the token"),
    Owner("Ray worker that waits", r"ray::IDLE|default_worker\.py", 1, "the token"),
    # besides Ray's calls: the endpoint of agents, and where `ctpo serve-agents` is asked for attempts
    Owner("driver", r"ctpo_megatron\.cli", 3, "Ray: the token; the endpoint: keys"),
    Owner("SGLang's scheduler", r"sglang::scheduler", 3, "anybody"),
    Owner("SGLang's HTTP server", r"engine\.sglang\.entry", 1, "the key"),
)


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that anybody who reaches its address may talk to. `protocol`: TCP or UDP."""

    pid: int
    owner: str
    protocol: str
    address: str
    port: int


def listeners(processes: Iterable[psutil.Process]) -> list[Listener]:
    """All of these processes; one that ends meanwhile has none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += _of(process)
    return found


def _of(process: psutil.Process) -> list[Listener]:
    owner = owner_of(process)
    return [
        Listener(process.pid, owner, "UDP" if each.type == socket.SOCK_DGRAM else "TCP", each.laddr.ip, each.laddr.port)
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and each.laddr and not each.raddr)
    ]


def owner_of(process: psutil.Process) -> str:
    """The kind of a process; its command line where the table has none such.

    A scheduler is a fork of the HTTP server, and a forked process cannot always set a title.
    """
    line = " ".join(process.cmdline())
    name = next((each.name for each in OWNERS if re.search(each.words, line)), line[:200])
    parent = process.parent()
    if name == "SGLang's HTTP server" and parent is not None and "engine.sglang.entry" in " ".join(parent.cmdline()):
        return "SGLang's scheduler"
    return name


def strangers(found: list[Listener]) -> list[str]:
    """What is not as the table has it: beyond the loopback, of a process that is not in it, or more than such a process has."""
    most = {each.name: each.most for each in OWNERS}
    wrong = [f"beyond the loopback: {each}" for each in found if each.address not in LOOPBACK]
    wrong += [f"of nobody in the table: {each}" for each in found if each.owner not in most]
    numbers = Counter((each.pid, each.owner) for each in found)
    return wrong + [f"{n} of {who} (process {pid})" for (pid, who), n in numbers.items() if n > most.get(who, n)]
