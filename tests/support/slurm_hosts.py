"""Hosts of a test on this machine: each has its own network, addresses, host name and process list, as real ones do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psutil

SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# The first process of a host: it names the host, then waits for its daemon and for every orphan, as an init does.
INIT = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && { "$@" & wait; }'


def namespaces_refused() -> str | None:
    """Why this machine cannot make such hosts; None where it can."""
    missing = [name for name in ("ip", "nsenter", "unshare", "hostname", "mount") if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"ctpo{os.getpid()}-try"
    attempts = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", name, "type", "bridge"],
        ["unshare", "--pid", "--fork", "--mount", "--uts", "true"],
    ]
    try:
        for words in attempts:
            run(words)
    except RuntimeError as error:
        return f"no hosts can be made here: {error}"
    finally:
        run(["ip", "link", "del", name], check=False)
        run(["ip", "netns", "del", name], check=False)
    return None


def run(words: list[str], *, check: bool = True) -> None:
    """Run a command; with `check`, raise RuntimeError with its message when it fails."""
    env = {**os.environ, "PATH": SEARCH}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=env, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """A bridge with the address `gateway` on this machine, and hosts behind it; close() removes all of it.

    The network is one of those kept for benchmarks (RFC 2544), numbered by this process.
    """

    def __init__(self, directory: Path, names: list[str]) -> None:
        self._tag = f"ctpo{os.getpid()}"
        self._network = f"198.18.{os.getpid() % 256}"
        self.gateway = f"{self._network}.1"
        self.addresses = {name: f"{self._network}.{index}" for index, name in enumerate(names, start=2)}
        self._hosts_file = directory / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        self._hosts_file.write_text("\n".join(lines) + "\n")
        self._inits: dict[str, subprocess.Popen] = {}

    def open(self) -> None:
        """Make the bridge and one network namespace per host, joined to it."""
        self._ip("link", "add", self._tag, "type", "bridge")
        self._ip("addr", "add", f"{self.gateway}/24", "dev", self._tag)
        self._ip("link", "set", self._tag, "up")
        for name, address in self.addresses.items():
            space, port = self._space(name), f"{self._tag}{name}"
            self._ip("netns", "add", space)
            self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("link", "set", port, "master", self._tag, "up")
            self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                self._ip("-n", space, "link", "set", link, "up")
            self._ip("-n", space, "route", "add", "default", "via", self.gateway)

    def boot(self, name: str, *daemon: str, log: Path, env: dict[str, str]) -> subprocess.Popen:
        """Start a host with one daemon on it. The host and all its processes end when the result is killed."""
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
        init = ["sh", "-c", INIT, "init", name, str(self._hosts_file), *daemon]
        with log.open("wb") as output:
            # not `ip netns exec`, which hides /sys/fs/cgroup
            words = ["nsenter", f"--net=/run/netns/{self._space(name)}", *unshare, *init]
            booted = subprocess.Popen(words, stdout=output, stderr=output, env={**env, "PATH": SEARCH}, start_new_session=True)
        self._inits[name] = booted
        return booted

    def start(self, name: str, *words: str, log: Path, env: dict[str, str]) -> subprocess.Popen:
        """Start a command on a host that is up; it ends with the host."""
        inside = psutil.Process(self._inits[name].pid).children()[0].pid
        with log.open("wb") as output:
            enter = ["nsenter", f"--target={inside}", "--net", "--mount", "--uts", "--pid", "--", *words]
            return subprocess.Popen(enter, stdout=output, stderr=output, env=env, start_new_session=True)

    def close(self) -> None:
        """End every host and remove what open() made, as far as it came."""
        for init in self._inits.values():
            init.kill()
            init.wait()
        for name in self.addresses:
            self._ip("netns", "del", self._space(name), check=False)
        self._ip("link", "del", self._tag, check=False)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _ip(self, *words: str, check: bool = True) -> None:
        run(["ip", *words], check=check)
