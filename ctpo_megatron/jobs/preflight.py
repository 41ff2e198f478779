"""`ctpo preflight`: whether the nodes of this job, or this machine alone, can start a run. One table, one verdict."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.errors import CtpoError
from ctpo_megatron.ports import free_port
from ctpo_megatron.slurm.allocation import Allocation, address_of, hosts
from ctpo_megatron.slurm.preflight.report import as_table
from ctpo_megatron.slurm.preflight.task import WHOLE_TIMEOUT_S, Task, Wanted, examine

LOOPBACK = "127.0.0.1"
WIDTH = 150  # of lines that do not go to a terminal


def preflight_by_hand(job: Allocation, words: list[str]) -> int:
    """Returns the exit code of a preflight of the nodes of `job`: one task on each, started with `words`, which say what runs."""
    names = hosts(job)
    address = address_of(names[0])
    where = [f"--meet={address}:{job.preflight_port}", f"--ray={address}:{job.port}", f"--hosts={','.join(names)}"]
    srun = ["srun", f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0"]
    command = [*srun, sys.executable, "-m", "ctpo_megatron.cli", "preflight", "--task", *where, *words]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=2 * WHOLE_TIMEOUT_S, check=False).returncode
    except subprocess.TimeoutExpired as error:
        raise CtpoError(
            f"srun did not end within {2 * WHOLE_TIMEOUT_S:.0f} s; `squeue --steps` shows what it waits for"
        ) from error


def this_machine() -> Task:
    """Returns the task of a preflight of this machine alone."""
    return Task(f"{LOOPBACK}:{free_port(LOOPBACK)}", f"{LOOPBACK}:{free_port(LOOPBACK)}", 0, [socket.gethostname()])


def preflight_task(config: RunConfig, task: Task) -> int:
    """Returns the exit code of this node's part: on the first node that of the verdict, which is printed, on others 0."""
    evaluated = (each.file for each in benchmarks_of(config.data, config.eval, config.rollout))
    paths = (config.model.path, config.data.train, *evaluated)
    wanted = Wanted(Path(config.run_dir), paths, on_gpus=config.cluster.device == "cuda")
    verdict = examine(task, wanted, os.environ)
    if verdict is None:
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(as_table(verdict))
    console.print(verdict.sentence, style="bold red" if verdict.exit_code else "green")
    return verdict.exit_code
