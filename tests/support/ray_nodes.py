"""Nodes of one Ray cluster on this machine, each with a raylet of its own, started and lost as the nodes of a job are."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ctpo_megatron.ports import free_port
from ctpo_megatron.slurm.ray_node import SETTINGS

RAY = str(Path(sys.executable).parent / "ray")
STARTED = "Ray runtime started."
LOOPBACK = "127.0.0.1"


class RayNodes:
    """`with RayNodes(cpus=2) as nodes: lost = nodes.add(1); nodes.lose(lost)`. Who joins needs `environment`."""

    def __init__(self, cpus: int) -> None:
        self._temp = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # short, since Unix sockets live below it
        self.address = f"{LOOPBACK}:{free_port(LOOPBACK)}"
        self.environment = {**os.environ, **SETTINGS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self._cpus = cpus
        self._nodes: list[subprocess.Popen] = []

    def __enter__(self) -> RayNodes:
        try:
            port = self.address.rpartition(":")[2]
            self._start("--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", cpus=self._cpus)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for node in reversed(self._nodes):
            self._end(node)
        shutil.rmtree(self._temp, ignore_errors=True)

    def add(self, cpus: int) -> subprocess.Popen:
        """A further node."""
        return self._start(f"--address={self.address}", cpus=cpus)

    def lose(self, node: subprocess.Popen) -> None:
        """Kill all of a node's processes at once, as when the host fails: Ray's, and those of the run on it."""
        self._end(node)

    def on(self, node: subprocess.Popen, word: str) -> list[psutil.Process]:
        """The processes of a node with that word in their command line."""
        found = []
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word in each for each in process.cmdline()):
                    found.append(process)
        return found

    @property
    def head(self) -> subprocess.Popen:
        return self._nodes[0]

    def _start(self, *words: str, cpus: int) -> subprocess.Popen:
        log = self._temp.with_name(f"{self._temp.name}-{len(self._nodes)}.log")
        command = [RAY, "start", "--block", f"--node-ip-address={LOOPBACK}", f"--temp-dir={self._temp}", f"--num-cpus={cpus}"]
        command += ["--object-store-memory=134217728", "--min-worker-port=0", "--max-worker-port=0", *words]
        with log.open("wb") as output:
            node = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, start_new_session=True
            )
        self._nodes.append(node)
        deadline = time.monotonic() + 60
        while STARTED not in log.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start: {log.read_text(errors='replace')}")
            time.sleep(0.1)
        log.unlink()
        return node

    @staticmethod
    def _end(node: subprocess.Popen) -> None:
        if node.poll() is not None:
            return
        below = psutil.Process(node.pid).children(recursive=True)
        for process in [*below, psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(10)
        psutil.wait_procs(below, timeout=10)
