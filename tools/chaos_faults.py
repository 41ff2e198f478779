"""Faults of a chaos run: which process, in which phase, by which signal; and how both are found from outside."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Kind = Literal[
    "driver", "trainer rank 0", "trainer rank 1", "server actor", "SGLang parent", "scheduler", "raylet", "GCS", "tool", "judge"
]
Phase = Literal["start", "rollout", "training", "publishing", "saving", "evaluating", "stopping"]
Signal = Literal["KILL", "STOP"]

KINDS: tuple[Kind, ...] = (
    "driver",
    "trainer rank 0",
    "trainer rank 1",
    "server actor",
    "SGLang parent",
    "scheduler",
    "raylet",
    "GCS",
    "tool",
    "judge",
)
PHASES: tuple[Phase, ...] = ("start", "rollout", "training", "publishing", "saving", "evaluating", "stopping")
SERVERS: tuple[Kind, ...] = ("server actor", "SGLang parent", "scheduler")
RANKS: tuple[Kind, ...] = ("trainer rank 0", "trainer rank 1")
BEGIN_ANEW = ("driver", "raylet", "GCS")  # after which the command begins anew
CALLED = ("tool", "judge")  # that live for a call, of a rollout or an evaluation
NUMBERS: dict[Signal, int] = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal to a process of that kind, once the run is in that phase."""

    kind: Kind
    phase: Phase
    by: Signal

    def __str__(self) -> str:
        return f"SIG{self.by} to {self.kind}, {self.phase}"


def draw(seed: int, count: int) -> list[Fault]:
    """Returns `count` faults in random order: every kind with both signals, and every phase with a rank, a server and the driver.

    A short list is cut from the front of that, so that it has as many kinds as it can.
    """
    rng = random.Random(seed)
    middle: list[Phase] = ["rollout", "training", "publishing", "saving", "evaluating"]
    signals: tuple[Signal, ...] = ("KILL", "STOP")
    # in turn, and the other way round in the second turn
    wanted = [
        Fault(kind, _phase(kind, rng, middle), signals[(place + turn) % 2]) for turn in (0, 1) for place, kind in enumerate(KINDS)
    ]
    for phase in PHASES:
        for kind in ("driver", rng.choice(RANKS), rng.choice(SERVERS)):
            wanted.append(Fault(kind, phase, rng.choice(["KILL", "KILL", "STOP"])))
    while len(wanted) < count:
        kind = rng.choice(KINDS)
        wanted.append(Fault(kind, _phase(kind, rng, middle), rng.choice(["KILL", "STOP"])))
    chosen = wanted[:count]
    rng.shuffle(chosen)
    return _in_an_order_that_works(chosen)


def _phase(kind: Kind, rng: random.Random, middle: Sequence[Phase]) -> Phase:
    return rng.choice(["rollout", "evaluating"]) if kind in CALLED else rng.choice(middle)


def _in_an_order_that_works(faults: list[Fault]) -> list[Fault]:
    """A fault at the start wants a start: each follows one after which the command begins anew."""
    at_start = [each for each in faults if each.phase == "start"]
    ordered = []
    for each in (each for each in faults if each.phase != "start"):
        ordered.append(each)
        if at_start and (each.phase == "stopping" or each.kind in BEGIN_ANEW):
            ordered.append(at_start.pop())
    return [*at_start, *ordered]  # what is left over is met at the first start


def find(kind: Kind, driver: psutil.Process) -> psutil.Process | None:
    """Returns a process of that kind below `driver`; None where there is none now."""
    if kind == "driver":
        return driver
    is_it = _TELL[kind]
    for each in _below(driver, directly=kind in (*CALLED, "raylet", "GCS")):
        with contextlib.suppress(psutil.Error, OSError):  # it has just ended
            if is_it(each):
                return each
    return None


def _below(driver: psutil.Process, *, directly: bool) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        if not directly:
            yield from driver.children(recursive=True)
            return
        for path in Path(f"/proc/{driver.pid}/task").glob("*/children"):  # a tool lives for milliseconds
            with contextlib.suppress(OSError, psutil.Error):
                yield from (psutil.Process(int(pid)) for pid in path.read_text().split())


def title(process: psutil.Process) -> str:
    """Returns the first word of a process's command line, which Ray and SGLang write anew."""
    return (process.cmdline() or [""])[0]


def _rank(number: int) -> Callable[[psutil.Process], bool]:
    def tell(process: psutil.Process) -> bool:
        log = Path(os.readlink(f"/proc/{process.pid}/fd/1")).name
        return log == f"trainer_{number}.log" and title(process).startswith("ray::")

    return tell


_TELL: dict[Kind, Callable[[psutil.Process], bool]] = {
    "trainer rank 0": _rank(0),
    "trainer rank 1": _rank(1),
    "server actor": lambda process: title(process).startswith("ray::EngineActor"),
    "SGLang parent": lambda process: "ctpo_megatron.engine.sglang.entry" in " ".join(process.cmdline()),
    "scheduler": lambda process: title(process).startswith("sglang::scheduler"),
    "raylet": lambda process: process.name() == "raylet",
    "GCS": lambda process: process.name() == "gcs_server",
    "tool": lambda process: process.name() == "bwrap",
    "judge": lambda process: "ctpo_megatron.rollout.judge" in process.cmdline(),
}
