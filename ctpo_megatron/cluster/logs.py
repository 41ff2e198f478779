"""One log file per process of a run."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR2  # an actor that gets it writes its stacks into its log, whatever it is doing


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, native code's included, to `path` (appended); and its stacks at STACK_SIGNAL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message; empty when there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
