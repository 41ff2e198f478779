"""SLURM's own commands, asked with a bound on time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from ctpo_megatron.errors import CtpoError

TIMEOUT_S = 60.0  # a controller that is busy answers late; SLURM's own bound for a message is 10 s, and commands try again


class SlurmError(CtpoError, RuntimeError):
    """A command of SLURM is missing, failed, or gave no answer."""


def ask(*words: str, environment: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """Returns what a command of SLURM printed. `environment`: variables beside those of this process. Raises SlurmError."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **(environment or {})}, check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{words[0]} is not installed here; run this on a host that submits jobs to SLURM") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{words[0]} gave no answer within {timeout_s:.0f} s; is SLURM's controller up? `sinfo` tells"
        ) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{words[0]} failed: {said}")
    return done.stdout.strip()
