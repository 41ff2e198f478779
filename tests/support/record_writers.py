"""What writes the numbered records of a run, one kind of file each, and reads all numbers back in their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctpo_megatron.record.board import Board
from ctpo_megatron.record.events import EventLog, RunReady
from ctpo_megatron.record.files import MetricsFile, Through
from ctpo_megatron.record.segments import SegmentWriter, read_segment, segments
from ctpo_megatron.record.trajectories import TrajectoryFiles
from ctpo_megatron.types import Prompt, Status, Trajectory, TrajectoryGroup
from tests.support.trajectories import ATTEMPT, GROUP

WORDS = "word " * 150  # a record that is cut in the middle when the disk is full


# (what writes record n, how to read all numbers back, in their order)
Writer = tuple[Callable[[int], None], Callable[[], list[int]]]


def metrics(run: Path, through: Through) -> Writer:
    file = MetricsFile(run / "metrics.jsonl", 0, through)
    read = (run / "metrics.jsonl").read_text
    return lambda n: file.write(n, {WORDS: 1.0}), lambda: [json.loads(line)["step"] for line in read().splitlines()]


def events(run: Path, through: Through) -> Writer:
    log = EventLog(run / "events.jsonl", through=through)
    read = (run / "events.jsonl").read_text
    return lambda n: log(RunReady(float(n))), lambda: [json.loads(line)["seconds"] for line in read().splitlines()]


def board(run: Path, through: Through) -> Writer:
    writer = Board(run / "tb", 0, through)

    def read() -> list[int]:
        found = EventAccumulator(str(run / "tb"), size_guidance={"tensors": 0}).Reload()
        return [event.step for event in found.Tensors("t/text_summary")]

    return lambda n: writer.text("t", WORDS, n), read


def journal(run: Path, through: Through) -> Writer:
    writer, places = SegmentWriter(run / "journal", through), []

    def write(n: int) -> None:
        places.append(writer.append(f"{n} {WORDS}".encode()))
        if n % 30 == 0:  # the next record begins a file
            writer.end()

    def read() -> list[int]:
        found = [payload for path in segments(run / "journal") for _, payload in read_segment(path)]
        assert found == [place.read() for place in places], "a record is not where it was said to be"
        return [int(payload.split()[0]) for payload in found]

    return write, read


def rollouts(run: Path, through: Through) -> Writer:
    files = TrajectoryFiles(run, 0, through)

    def read() -> list[int]:
        found = sorted((run / "rollouts").iterdir())
        assert all(json.loads(path.read_text())["text"] == 9 * WORDS for path in found)
        return [int(path.stem.rpartition("_")[2]) for path in found]

    return lambda n: files.write("step", n, [group(9 * WORDS)]), read


def group(text: str) -> TrajectoryGroup:
    trajectory = Trajectory(0, [1], [], Status.FINISHED, text=text, id=ATTEMPT)
    return TrajectoryGroup(Prompt(0, ({"role": "user", "content": "q"},), "1"), [trajectory], id=GROUP)
