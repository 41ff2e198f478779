"""A real SLURM cluster on this machine: munged, slurmctld, and one slurmd on each of several hosts of its own."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.slurm_hosts import SEARCH, Hosts, namespaces_refused

START_TIMEOUT_S = 60.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
STATES_OF_THE_END = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


def obstacle() -> str | None:
    """Why SLURM cannot run here; None where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    return f"not installed: {', '.join(missing)}" if missing else namespaces_refused()


REQUEUE_DELAY_S = 15  # SLURM keeps a requeued job for as long as its credentials may be used: 120 s unless told otherwise


class SlurmCluster:
    """`with SlurmCluster(directory, nodes=2) as cluster: cluster.submit(...)`. `addresses` has that of each node.

    A job that is requeued waits REQUEUE_DELAY_S.
    """

    def __init__(self, directory: Path, nodes: int = 2, cpus: int = 1) -> None:
        directory.mkdir()
        self.directory = directory
        self._hosts = Hosts(directory, [f"n{index}" for index in range(1, nodes + 1)])
        self.addresses = self._hosts.addresses
        self._cpus = cpus
        self._daemons: list[subprocess.Popen] = []
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self._hosts.open()
            self._write_config()
            self._start_munge()
            self._daemon("slurmctld", "-D", "-f", str(self.directory / "slurm.conf"))
            for name in self.addresses:
                log = self.directory / f"{name}.out"
                self._daemons.append(self._hosts.boot(name, "slurmd", "-D", log=log, env=self.environment))
            self._wait_for(self._all_idle, "the nodes to become idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._hosts.close()
        for daemon in reversed(self._daemons):
            if daemon.poll() is None:
                daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def command(self, *args: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Output of one of SLURM's commands, run with additions to the environment."""
        env = {**self.environment, **(environment or {})}
        done = subprocess.run(args, capture_output=True, text=True, env=env, timeout=60, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(args)} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *args: str, environment: Mapping[str, str] | None = None) -> int:
        """`sbatch ARGS`; the id of the job."""
        return int(self.command("sbatch", "--parsable", *args, environment=environment))

    def job(self, job_id: int) -> Mapping[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "--oneliner", str(job_id))))

    def wait(self, job_id: int, timeout_s: float) -> Mapping[str, str]:
        """The job's record once it has ended on all nodes. Raises TimeoutError."""
        self._wait_for(lambda: self.job(job_id)["JobState"] in STATES_OF_THE_END, f"job {job_id} to end", timeout_s)
        self._wait_for(self._all_idle, "the nodes to be idle again")
        return self.job(job_id)

    def start_on(self, name: str, *words: str, log: Path) -> subprocess.Popen:
        """Start a command on a node, outside of every job, as another of the user's shells would."""
        return self._hosts.start(name, *words, log=log, env=dict(self.environment))

    def wait_pending(self, job_id: int, timeout_s: float) -> None:
        """Wait until a job that was requeued is pending, and nothing of its last start is left. Raises TimeoutError."""
        self._wait_for(lambda: self.job(job_id)["JobState"] == "PENDING", f"job {job_id} to be pending", timeout_s)
        self._wait_for(self._all_idle, "the nodes to be idle again")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait for `condition`. Raises TimeoutError."""
        self._wait_for(condition, what, timeout_s)

    def _all_idle(self) -> bool:
        return self.command("sinfo", "--noheader", "--Node", "--format=%t", check=False).split() == ["idle"] * len(self.addresses)

    def _start_munge(self) -> None:
        directory = self.directory
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": directory / "munge.socket", "pid-file": directory / "munge.pid"}
        files |= {"log-file": directory / "munge.log", "seed-file": directory / "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self._wait_for((directory / "munge.socket").exists, "munged's socket")

    def _daemon(self, program: str, *args: str) -> None:
        path = shutil.which(program, path=SEARCH)
        log = (self.directory / f"{program}-{len(self._daemons)}.out").open("wb")
        with log:
            daemon = subprocess.Popen([path, *args], stdout=log, stderr=log, env=self.environment, start_new_session=True)
        self._daemons.append(daemon)

    def _wait_for(self, condition, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    raise RuntimeError(f"{daemon.args[0]} ended with {daemon.returncode}\n{self._logs()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:.0f} s for {what}\n{self._logs()}")
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in self.directory.glob("*.out"))

    def _write_config(self) -> None:
        directory, user, host = self.directory, getpass.getuser(), socket.gethostname()
        for name in ("state", "spool"):
            (directory / name).mkdir(parents=True)
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}({self._hosts.gateway})",
            f"SlurmctldPort={free_port(self._hosts.gateway)}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={directory}/munge.socket,cred_expire={REQUEUE_DELAY_S - 1}",
            "CryptoType=crypto/munge",
            f"StateSaveLocation={directory}/state",
            f"SlurmdSpoolDir={directory}/spool/%n",
            f"SlurmctldPidFile={directory}/slurmctld.pid",
            f"SlurmdPidFile={directory}/slurmd-%n.pid",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "JobAcctGatherType=jobacct_gather/none",
            "KillWait=20",
            "ReturnToService=2",
            "SchedulerParameters=batch_sched_delay=1,sched_interval=5",
            f"FirstJobId={os.getpid() * 100 % 1_000_000 + 1}",  # ids name ports and directories: no two clusters share them
        ]
        nodes = [f"NodeName={name} NodeAddr={addr} CPUs={self._cpus} State=UNKNOWN" for name, addr in self.addresses.items()]
        lines += [*nodes, f"PartitionName=all Nodes={','.join(self.addresses)} Default=YES MaxTime=INFINITE State=UP"]
        (directory / "slurm.conf").write_text("\n".join(lines) + "\n")


def free_port(address: str) -> int:
    """A port of `address` where nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
