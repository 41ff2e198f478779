"""One node's part of a preflight, from its own checks to the first node's verdict."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ctpo_megatron.slurm.preflight import bandwidth, gpus, local
from ctpo_megatron.slurm.preflight.meeting import Meeting, NoAnswer, clock, ports, shared_files
from ctpo_megatron.slurm.preflight.report import Finding, NodeReport, Verdict, judge, silent
from ctpo_megatron.slurm.ray_node import my_address

MEET_TIMEOUT_S = 60.0  # for all nodes to start their task and load torch
IMPORT_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 60.0  # of the others, once this node is through
WHOLE_TIMEOUT_S = 300.0  # beyond all bounds above: something hangs that has none of its own
HUNG = 2


@dataclass(frozen=True, slots=True)
class Task:
    """This node's place: number `rank` of `hosts`, which meet at `meet`; `ray` is where Ray will listen. HOST:PORT both."""

    meet: str
    ray: str
    rank: int
    hosts: list[str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the run is going to need: a directory to write, paths to read, and whether it is one on GPUs."""

    run_dir: Path
    inputs: tuple[str, ...]
    on_gpus: bool  # or not yet decided


def examine(task: Task, wanted: Wanted, environment: Mapping[str, str]) -> Verdict | None:
    """Returns the verdict on all nodes on the first one, None on the others, whose findings it has."""
    with _ends_within(WHOLE_TIMEOUT_S):
        imports = local.Imports()
        findings = [*_own(wanted, environment)]
        meeting = Meeting(task.meet, task.rank, task.hosts, MEET_TIMEOUT_S)
        here = meeting.gather("here", "yes", MEET_TIMEOUT_S) if task.rank == 0 else {}
        if task.rank == 0:
            meeting.tell("go", "yes" if len(here) == len(task.hosts) else "no")
        else:
            meeting.tell(f"here/{task.rank}", "yes")
        if meeting.hear("go", MEET_TIMEOUT_S + 10.0) == "yes":
            findings += _together(meeting, task, wanted)
        findings += imports.findings(IMPORT_TIMEOUT_S)
        report = NodeReport(host=task.hosts[task.rank], findings=tuple(findings), same={"versions": local.versions()})
        if task.rank:
            meeting.tell(f"report/{task.rank}", report.model_dump_json())
            return None
        return judge([report, *(_report_of(meeting, rank, rank in here) for rank in meeting.others)])


def _own(wanted: Wanted, environment: Mapping[str, str]) -> Iterator[Finding]:
    yield local.inputs(wanted.inputs)
    yield local.memory()
    yield local.shared_memory(wanted.on_gpus)
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    yield from gpus.gpus(int(given) if given.isdigit() else None)


def _together(meeting: Meeting, task: Task, wanted: Wanted) -> Iterator[Finding]:
    """Yield what needs the other nodes. One that does not answer is named by the first node, which has no report of it."""
    mine = my_address(task.ray) if task.rank else task.ray.rpartition(":")[0]
    try:
        yield clock(meeting)
        yield shared_files(meeting, wanted.run_dir)
        yield ports(meeting, task.ray, mine)
        yield bandwidth.all_reduce(meeting, mine)
    except NoAnswer as error:
        yield Finding(topic="other nodes", state="bad", found=str(error))


def _report_of(meeting: Meeting, rank: int, came: bool) -> NodeReport:
    host = meeting.hosts[rank]
    if not came:
        why = (
            f"its task did not reach the first node within {MEET_TIMEOUT_S:.0f} s; what srun says of it stands above, if anything"
        )
        return silent(host, why)
    try:
        return NodeReport.model_validate_json(meeting.hear(f"report/{rank}", REPORT_TIMEOUT_S))
    except NoAnswer:
        return silent(host, f"its task did not report within {REPORT_TIMEOUT_S:.0f} s")
    except ValidationError as error:
        return silent(host, f"its report cannot be read: {error.errors()[0]['msg']}")


@contextlib.contextmanager
def _ends_within(seconds: float) -> Iterator[None]:
    """End this process after `seconds`, should the block not be left by then."""
    begun = time.monotonic()

    def end() -> None:
        os.write(2, f"error: the preflight of this node hangs after {time.monotonic() - begun:.0f} s; it is ended\n".encode())
        os._exit(HUNG)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
