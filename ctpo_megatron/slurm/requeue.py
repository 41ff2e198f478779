"""Whether a run that was stopped goes on by itself: how a start ended, and how many in a row brought no newer checkpoint.

Every start of a run under SLURM adds a line to RUN_DIR/slurm_starts.jsonl. What ends a start is the exit code of its driver;
launch/ctpo.sbatch knows the two codes below and nothing else of this.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ctpo_megatron.checkpoints.files import step_of, verified_checkpoints
from ctpo_megatron.errors import storing
from ctpo_megatron.record.files import GrowingFile, drop_half_line
from ctpo_megatron.record.run_events import RunStopped

STOPPED = 75  # of a driver that stopped in order: the same command goes on; of a job's step: requeue the job
AGAIN = 76  # of a job's step: its driver died without a word, so start the step again
STARTS_FILE = "slurm_starts.jsonl"
NO_STEP = -1  # of a run that has no checkpoint yet
FROZEN = 70  # of a driver whose event loop came to nothing: its watch ended it (cluster/watch/loop_watch.py)
_ENDED_BY_SIGNAL = (130, 143)  # Ctrl-C and SIGTERM: somebody wanted the end

Next = Literal["done", "stopped", "again", "failed"]


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run's driver. `step`: of the newest checkpoint at that time."""

    job_id: int
    restarts: int
    time: float  # seconds since 1970
    step: int


def newest_step(run_dir: Path) -> int:
    """Returns the step of the newest checkpoint that counts, NO_STEP where there is none."""
    found = verified_checkpoints(run_dir / "checkpoints")
    return step_of(found[-1]) if found else NO_STEP


def record_start(run_dir: Path, start: Start) -> None:
    """Add `start` to the run's list. Raises StorageError."""
    file = run_dir / STARTS_FILE
    with storing(file):
        run_dir.mkdir(parents=True, exist_ok=True)
    drop_half_line(file)
    growing = GrowingFile(file)
    growing.append_line(json.dumps(asdict(start)))
    growing.close()


def starts(run_dir: Path) -> list[Start]:
    """Returns the run's starts, the oldest first. A line that is none is left out: it was cut off by the end of its process."""
    file = run_dir / STARTS_FILE
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(Start(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def stopped_for_good(run_dir: Path) -> bool:
    """Returns whether the last stop in order was asked for by a file in the run directory or an alarm: an end, not a pause."""
    events = run_dir / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    for line in reversed(lines):
        if f'"event": "{RunStopped.name}"' in line:
            return str(json.loads(line)["reason"]).startswith(("the file ", "alarm "))
    return False


def fruitless(known: list[Start], step: int) -> int:
    """Returns how many starts in a row, up to the last, began with the newest checkpoint that there is now: that of `step`."""
    count = 0
    for start in reversed(known):
        if start.step != step:
            break
        count += 1
    return count


def what_next(code: int, *, told: bool, ray_lost: bool) -> Next:
    """Returns what the end of a driver means.

    `code`: as Popen gives it, negative for a signal. `told`: the driver itself wrote why it failed. `ray_lost`: Ray ended first.
    """
    if code == 0:
        return "done"
    if code == STOPPED:
        return "stopped"
    died = code < 0 or code == FROZEN or (code > 128 and code not in _ENDED_BY_SIGNAL)
    # a driver that begins anew because Ray was lost finds none at the address that it was given, and ends with 2
    if died or (code == 1 and not told) or (code in (1, 2) and ray_lost):
        return "again"
    return "failed"
