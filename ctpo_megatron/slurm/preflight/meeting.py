"""Where the tasks of a preflight meet: a store that the first node serves. It holds text, and every wait is bounded."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ctpo_megatron.errors import CtpoError
from ctpo_megatron.ports import free_port
from ctpo_megatron.slurm.preflight.report import Finding

MOST_SKEW_S = 5.0
STEP_TIMEOUT_S = 20.0  # for one node to answer another, once all are there
SHOWS_WITHIN_S = 15.0  # what one node wrote on the others: NFS may keep an old directory for some seconds
CONNECT_TIMEOUT_S = 5.0


class NoAnswer(CtpoError, RuntimeError):
    """Another node did not say in time what it was asked."""


class Meeting:
    """One node's place in it: number `rank` of `hosts`. The first serves the store at `address`, HOST:PORT."""

    def __init__(self, address: str, rank: int, hosts: list[str], timeout_s: float) -> None:
        self.rank, self.hosts = rank, hosts
        self._host, _, port = address.rpartition(":")
        self.store = dist.TCPStore(
            self._host, int(port), is_master=rank == 0, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )

    @property
    def others(self) -> list[int]:
        """Returns the numbers of the other nodes."""
        return [each for each in range(len(self.hosts)) if each != self.rank]

    def tell(self, key: str, text: str) -> None:
        """Put a text where all nodes find it."""
        self.store.set(key, text)

    def hear(self, key: str, timeout_s: float = STEP_TIMEOUT_S) -> str:
        """Returns the text under `key`, once it is there. Raises NoAnswer."""
        try:
            self.store.wait([key], timedelta(seconds=max(timeout_s, 0.001)))
            return str(self.store.get(key).decode())
        except (RuntimeError, ValueError) as error:  # torch's DistStoreError is one: no such key in time, or no store any more
            raise NoAnswer(f"no {key} within {timeout_s:.0f} s") from error

    def gather(self, name: str, mine: str, timeout_s: float = STEP_TIMEOUT_S) -> dict[int, str]:
        """Returns what each node told under `name`, this one included; without those that did not within `timeout_s`."""
        self.tell(f"{name}/{self.rank}", mine)
        deadline, found = time.monotonic() + timeout_s, {self.rank: mine}
        for rank in self.others:
            try:
                found[rank] = self.hear(f"{name}/{rank}", max(deadline - time.monotonic(), 0.05))
            except NoAnswer:
                continue
        return found


def clock(meeting: Meeting) -> Finding:
    """Returns how far this node's clock is from the first one's, by the quicker half of a question and its answer.

    All nodes call it. Raises NoAnswer.
    """
    if meeting.rank == 0:
        for rank in meeting.others:
            for question in range(2):  # the first may wait for its turn; the second is answered at once
                meeting.hear(f"clock/{rank}/{question}")
                meeting.tell(f"time/{rank}/{question}", repr(time.time()))
        return Finding(topic="clock", state="ok", found="the others are compared with it")
    skew = error = 0.0
    for question in range(2):
        asked = time.time()
        meeting.tell(f"clock/{meeting.rank}/{question}", "?")
        theirs = float(meeting.hear(f"time/{meeting.rank}/{question}", STEP_TIMEOUT_S * len(meeting.hosts)))
        answered = time.time()
        skew, error = (asked + answered) / 2 - theirs, (answered - asked) / 2
    if abs(skew) - error <= MOST_SKEW_S:
        return Finding(topic="clock", state="ok", found=f"within {abs(skew) + error:.2f} s of the first node's")
    meaning = f"more than {MOST_SKEW_S:.0f} s: start chrony or ntpd there; times in logs and of files would lie"
    return Finding(topic="clock", state="bad", found=f"{skew:+.1f} s from the first node's", meaning=meaning)


def shared_files(meeting: Meeting, directory: Path) -> Finding:
    """Returns whether what each node writes into `directory` is read by this one. All nodes call it."""
    topic, mine = "run directory", directory / f".preflight-{meeting.rank}"
    text = f"{meeting.hosts[meeting.rank]} {time.time_ns()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mine.write_text(text, encoding="utf-8")
        problem = ""
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
    told = meeting.gather("file", text)
    unseen = []
    deadline = time.monotonic() + SHOWS_WITHIN_S
    for rank in meeting.others if not problem else []:
        while not _holds(directory / f".preflight-{rank}", told.get(rank)):
            if time.monotonic() > deadline:
                unseen.append(meeting.hosts[rank])
                break
            time.sleep(0.1)
    meeting.gather("file read", "")  # nobody takes his file away before all have looked
    mine.unlink(missing_ok=True)
    if unseen:
        problem = f"does not show what {', '.join(unseen)} wrote within {SHOWS_WITHIN_S:.0f} s"
    if not problem:
        return Finding(topic=topic, state="ok", found=str(directory))
    return Finding(
        topic=topic, state="bad", found=f"{directory} {problem}", meaning="run_dir must be on a file system of all nodes"
    )


def ports(meeting: Meeting, ray: str, mine: str) -> Finding:
    """Returns whether this node reaches the others, and on the first one, whether the port of `ray` is free. All nodes call it.

    `mine`: this node's address. Every node listens and is called by its neighbour and by the first node.
    """
    problems = []
    with closing(_listen(mine)) as listener:
        told = meeting.gather("listens", f"{mine}:{listener.getsockname()[1]}")
        called = meeting.others if meeting.rank == 0 else sorted({0, (meeting.rank + 1) % len(meeting.hosts)} - {meeting.rank})
        problems += [problem for rank in called if (problem := _call(meeting.hosts[rank], told.get(rank)))]
        meeting.gather("called", "")
    if meeting.rank == 0:
        host, _, port = ray.rpartition(":")
        try:
            _listen(host, int(port)).close()
        except OSError as error:
            problems.append(f"Ray's {ray} cannot be used: {error.strerror or error}")
    if not problems:
        return Finding(topic="ports", state="ok", found="the other nodes answer" if meeting.others else f"{ray} is free")
    meaning = "another process holds the port, or a firewall stands between the nodes; the job's ports are 20000 to 65535"
    return Finding(topic="ports", state="bad", found="; ".join(problems), meaning=meaning)


def _listen(host: str, port: int | None = None) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, free_port(host) if port is None else port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _call(name: str, address: str | None) -> str | None:
    if address is None:
        return f"{name} said no address"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{name} does not answer at {address} ({error.strerror or error})"
    return None


def _holds(file: Path, text: str | None) -> bool:
    try:
        return text is not None and file.read_text(encoding="utf-8") == text
    except OSError:
        return False
