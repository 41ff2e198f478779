"""Programs and `ctpo` commands as a user would type them, for tools that call several in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parent.parent
END_TIMEOUT_S = 120.0  # that a program may take to end what it has started


def python(*words: object, limit_s: float | None = None) -> None:
    """Run a Python program of this project; end with its exit code if it fails, with 1 if it takes longer than `limit_s`."""
    command = [sys.executable, *map(str, words)]
    print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        print(f"error: it was ended, since it took longer than {limit_s:g} s", file=sys.stderr)
        process.terminate()
        code = 1
    except SystemExit:  # a signal's handler; Ctrl-C is told to the program too
        process.terminate()
        raise
    finally:
        _see_it_end(process)
    if code:
        raise typer.Exit(code)


def ctpo(command: str, config: str, *words: str, limit_s: float | None = None) -> None:
    """Run a `ctpo` command on a shipped config, with overrides and options."""
    python("-m", "ctpo_megatron.cli", command, ROOT / "configs" / config, *words, limit_s=limit_s)


def _see_it_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a program has ended itself and what it has started; first ask, then force one that does not."""
    for insist in (process.terminate, process.kill):
        try:
            process.wait(END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            insist()
    process.wait()
