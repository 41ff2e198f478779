"""This job's Ray on one node: `ray start --block` as a child that is ended by a signal. No other Ray on the node is touched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ctpo_megatron.errors import CtpoError
from ctpo_megatron.ports import free_port

JOIN_TIMEOUT_S = 300.0  # for the first node to answer
END_TIMEOUT_S = 15.0  # after SIGTERM
_LOG_LINES = 25
_STARTED = "Ray runtime started."  # what `ray start` says once its node is known to the cluster
SETTINGS = {
    "RAY_worker_niceness": "0",  # not 15: what else runs on a node does not come before trainer and servers
    "RAY_kill_child_processes_on_worker_exit": "0",  # servers end, and tidy up, when they lose the actor that has started them
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # the other nodes' Ray ends this long after the head's
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # when it is terminated, the run has ended: there is nothing to drain
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayDidNotStart(CtpoError, RuntimeError):
    """Ray could not be started on this node; the message ends with its log."""


class RayNode:
    """`with RayNode(head, mine, is_head=...) as ray:`; leaving the block ends it. `head`: HOST:PORT; `mine`: this node's address.

    Entering returns when the node is part of the cluster, or raises RayDidNotStart.
    """

    def __init__(self, head: str, mine: str, *, is_head: bool) -> None:
        self._head, self._mine, self._is_head = head, mine, is_head
        self._scratch: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RayNode:
        # short, since Unix sockets live below it
        self._scratch = Path(tempfile.mkdtemp(prefix=f"ray-{os.environ.get('SLURM_JOB_ID', 'x')}-", dir="/tmp"))
        try:
            if not self._is_head:
                wait_for_port(self._head, JOIN_TIMEOUT_S)
            with self._log.open("wb") as log:
                words = ["ray", "start", "--block", *self._words()]
                environment = {**os.environ, **SETTINGS}
                self._process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            self._wait_until_started()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        """Whether Ray has ended on this node by itself."""
        return self._process is not None and self._process.poll() is not None

    def said(self) -> str:
        """Returns the last lines that `ray start` printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])

    def close(self) -> None:
        """End this Ray, and what it left on the disk. Safe to call twice."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its children end with it
                process.wait()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _log(self) -> Path:
        assert self._scratch is not None
        return self._scratch / "ray-start.log"

    def _words(self) -> list[str]:
        """Returns the arguments of `ray start`: what this job was given here, and no listener that it does not need."""
        host, _, port = self._head.rpartition(":")
        words = [f"--node-ip-address={self._mine}", f"--temp-dir={self._scratch}", "--disable-usage-stats"]
        words += ["--include-log-monitor=false"]  # whose one reader would be the driver, which reads logs itself
        words += ["--min-worker-port=0", "--max-worker-port=0", *_resources(os.environ)]  # ports that the system chooses
        if not self._is_head:
            return [f"--address={host}:{port}", *words]
        # Ray Client, which nothing here uses, cannot be left out (Ray 2.60); its usual port may be another Ray's
        client = f"--ray-client-server-port={free_port(self._mine)}"
        return ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", client, *words]  # nothing scales the job

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while _STARTED not in self._log.read_text(errors="replace"):
            if self.ended or time.monotonic() > deadline:
                when = "" if self.ended else f" within {JOIN_TIMEOUT_S:.0f} s"
                where = f"{socket.gethostname()} ({self._mine})"
                raise RayDidNotStart(f"Ray did not start on {where}{when}. It said:\n{self.said()}")
            time.sleep(0.1)


def wait_for_port(address: str, timeout_s: float) -> None:
    """Return once something listens at `address`, HOST:PORT. Raises RayDidNotStart after `timeout_s`."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RayDidNotStart(
                    f"{socket.gethostname()}: the first node's Ray does not answer at {address} after {timeout_s:.0f} s ({error})"
                ) from error
        time.sleep(0.2)


def my_address(head: str) -> str:
    """Returns this node's address on the network in which the first node has its own. Sends nothing."""
    host, _, port = head.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def _resources(environment: Mapping[str, str]) -> list[str]:
    """Returns what SLURM gave this job on this node, not what the node has."""
    given = {"num-cpus": environment.get("SLURM_CPUS_ON_NODE"), "num-gpus": environment.get("SLURM_GPUS_ON_NODE")}
    return [f"--{name}={value}" for name, value in given.items() if value]
