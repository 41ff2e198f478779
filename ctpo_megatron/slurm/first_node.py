"""What the other nodes do for a job whose first one is lost.

A job with --no-kill that loses the node of its batch script is made smaller like any other, where SLURM (22.05) would requeue it
without that option. It then fails with the script; or, where nothing on that node can tell of the script's end, it stands idle
until its limit. So the other nodes look when their part of it ends.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import sys
import time

from ctpo_megatron.slurm.commands import SlurmError, ask

SEEN_WITHIN_S = 900.0  # SLURM calls a node down that has not answered for SlurmdTimeout, 300 s by default
LOOK_EVERY_S = 10.0
ANSWER_S = 5.0


def requeue_without_first(job_id: str, first: str, address: str) -> None:
    """Requeue the job where SLURM has taken its node `first` away, or end it where that is not possible.

    Returns at once where that node lives, and in a container without SLURM's commands, where nobody can tell. `address`:
    HOST:PORT of anything on it, whether somebody listens there or not. SIGTERM is ignored from here on. Raises SlurmError.
    """
    if shutil.which("scontrol") is None:
        return
    # SLURM sends it to every process of a job that ends, those that ask it something included
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not _is_without(job_id, first):
        if _lives(address) or time.monotonic() > deadline:
            return
        time.sleep(LOOK_EVERY_S)
    print(f"{first}, the first node, is gone, and with it the batch script; the job is requeued", file=sys.stderr, flush=True)
    try:
        ask("scontrol", "requeue", job_id)
    except SlurmError as error:
        if not _is_without(job_id, first):
            return  # another node was quicker
        print(f"error: {error}; the job is ended", file=sys.stderr, flush=True)
        ask("scancel", job_id)


def _is_without(job_id: str, first: str) -> bool:
    """Whether the job has, or had when it ended, nodes without that one; one that is pending has none. Raises SlurmError."""
    record = ask("scontrol", "show", "job", "--oneliner", job_id)
    nodes = re.search(r" NodeList=(\S+)", record)
    names = [] if nodes is None or nodes[1] == "(null)" else ask("scontrol", "show", "hostnames", nodes[1]).split()
    return bool(names) and first not in names


def _lives(address: str) -> bool:
    """Whether the host answers at all: a connection that it refuses is an answer too."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
