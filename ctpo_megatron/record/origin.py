"""Where a process comes from: its host, its job, the code that it runs, the command that began it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 10.0  # for SLURM's controller and for git
_SECRET = re.compile(r"(^|[._-])(key|token|secret|password|passwd|credentials?)=", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The job that a process belongs to. `began`: when it was given its nodes, seconds since 1970; None: not known."""

    id: str
    restarts: int
    began: float | None


def slurm_job(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Returns the SLURM job of this process, None outside of one. The controller is asked when it began, for a while."""
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    restarts = environment.get("SLURM_RESTART_COUNT", "")  # unset in the first run
    form = {**environment, "SLURM_TIME_FORMAT": "%s"}
    said = _said(["squeue", "--noheader", f"--jobs={job}", "--format=%S"], form)
    return SlurmJob(job, int(restarts) if restarts.isdigit() else 0, float(said) if said and said.isdigit() else None)


def commit() -> str | None:
    """Returns the git commit of this package, with `-dirty` where files were changed; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie in somebody else's checkout
        return None
    return _said(["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"], os.environ)


def host() -> str:
    """Returns this host's name."""
    return socket.gethostname()


def safe_words(words: Sequence[str]) -> tuple[str, ...]:
    """Returns a command's words, the program's name without its directory, without the values of keys that name secrets.

    Names and passwords in URLs are left out too.
    """
    program, rest = words[:1], words[1:]
    hidden = [f"{word.partition('=')[0]}=***" if _SECRET.search(word) else _IN_URL.sub("***@", word) for word in rest]
    return (*(Path(word).name for word in program), *hidden)


def _said(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Returns what a command prints; None where it fails, prints nothing or takes too long."""
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None
