"""The escape test: whether the sandbox of this host holds, seen by trying, before a program of a model is run.

The attempts are harmless and are made under the very options, limits and filter that programs get. Each case must be refused;
one that cannot be tried counts as one that was not.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.config.tools import ConfinedPython
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.rollout.sandbox.beside import beside
from ctpo_megatron.rollout.sandbox.command import MAX_FILE_BYTES, MIB
from ctpo_megatron.rollout.sandbox.python import Call, execute

CASES = ("network", "processes", "environment", "files", "forks", "memory", "disk", "output", "time")
PROBES_TIMEOUT_S = 30.0  # for all attempts, on however busy a host
ENDLESS_S = 0.1  # the time that is given to a program which would take so much longer that no busy host ends both together
ENDLESS = "import time; time.sleep(5)"


@dataclass(frozen=True, slots=True)
class Escape:
    """Something that must be refused and was not."""

    case: str  # one of CASES
    what: str

    def __str__(self) -> str:
        return f"{self.case} ({self.what})"


def require_confinement(config: ConfinedPython, key: str = "rollout.tool") -> None:
    """Return where all attempts are refused. Raises ConfigError, which names the cases that were not.

    `key`: what of the configuration asks for the sandbox.
    """
    found = escapes(config)
    if found:
        raise ConfigError(
            f"{key}: the sandbox does not hold on this host, so no program of a model is run here. What must be refused was "
            f"possible: {'; '.join(map(str, found))}. See `ctpo doctor`, the version of bubblewrap and what `bwrap` on PATH is."
        )


def escapes(config: ConfinedPython) -> list[Escape]:
    """Returns what a program could do that it must not; an empty list when all is well. Takes about a third of a second."""
    return beside(_escapes(config))


async def _escapes(config: ConfinedPython) -> list[Escape]:
    # the first attempts have time, since they are to be made; the last has little, since that is the attempt
    patient = config.model_copy(update={"timeout_s": PROBES_TIMEOUT_S})
    hurried = config.model_copy(update={"timeout_s": ENDLESS_S})
    with _host() as given:
        program = f"{_probes()}\nattempt(**{given | {'memory_bytes': config.memory_mb * MIB, 'file_bytes': MAX_FILE_BYTES}!r})"
        try:
            attempts, endless = await asyncio.gather(execute(program, patient), execute(ENDLESS, hurried))
        except RolloutError as error:
            return [Escape(case, f"not tried: {error}") for case in CASES]
    return [*_reported(attempts), *_too_long("output", attempts), *_endless(endless)]


def _reported(call: Call) -> Iterator[Escape]:
    line = call.stdout.partition("\n")[0]
    try:
        found: dict[str, list[str]] = json.loads(line)
        missing = [case for case in CASES if case not in ("output", *found)]
    except (ValueError, TypeError):
        found, missing = {}, [case for case in CASES if case != "output"]
    why = (call.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
    yield from (Escape(case, f"not tried: {why}") for case in missing)
    yield from (Escape(case, what) for case, each in found.items() for what in each)


def _too_long(case: str, call: Call) -> Iterator[Escape]:
    longest = max(len(call.stdout), len(call.stderr))
    if longest > MAX_FILE_BYTES:
        yield Escape(case, f"{longest} bytes written")
    elif longest < MAX_FILE_BYTES:
        yield Escape(case, f"not tried: the attempt ended after {longest} bytes")


def _endless(call: Call) -> Iterator[Escape]:
    if not call.timed_out:
        yield Escape("time", f"a program was not ended after {ENDLESS_S:g} s")


@contextmanager
def _host() -> Iterator[dict[str, Any]]:
    """What a program that is not confined would find: listeners, and a file of the user."""
    name = secrets.token_hex(8)
    with (
        tempfile.TemporaryDirectory(prefix="ctpo-") as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        secret, path = Path(folder) / name, Path(folder) / "socket"
        secret.write_text("found")
        abstract.bind(f"\0{name}")
        unix.bind(str(path))
        abstract.listen()
        unix.listen()
        prefix = os.path.realpath(sys.base_prefix)
        yield {"port": tcp.getsockname()[1], "abstract": name, "path": str(path), "secret": str(secret), "prefix": prefix}


def _probes() -> str:
    return Path(__file__).with_name("probes.py").read_text(encoding="utf-8")
