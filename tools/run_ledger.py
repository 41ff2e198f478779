"""What runs have left in their directories, however often they were killed: was everything used once, and are two the same run?

trained_once   every group is trained on once, in its step
sampled_once   nothing that was finished was sampled a second time, or not used; of a run that keeps its whole journal
same_run       weights, optimizer, rollouts and numbers of two runs that were given the same rollouts are equal, byte for byte
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from bench_loss import Check

from ctpo_megatron.checkpoints.files import all_checkpoints
from ctpo_megatron.record.segments import read_segment, segments
from ctpo_megatron.types import AttemptId, GroupId

CLOCK = ("time", "perf", "publish", "servers")  # rooms of metrics.jsonl whose numbers are of the machine and the hour


@dataclass(frozen=True)
class Sizes:
    """Of a run: training steps, groups a step and attempts a group."""

    steps: int
    groups: int
    attempts: int

    def groups_of(self, step: int) -> set[str]:
        """The names of the groups of training step `step`, counted from 1."""
        return {str(GroupId(number)) for number in range((step - 1) * self.groups, step * self.groups)}


def finished(segment: Path) -> Iterator[AttemptId]:
    """The attempts whose end is in this segment of a journal, one for each record."""
    for _, payload in read_segment(segment):
        made = msgspec.msgpack.decode(payload)["trajectory"]
        if made is not None:
            yield AttemptId(GroupId(**made["id"]["group"]), made["id"]["number"])


def trained_once(run_dir: Path, sizes: Sizes) -> list[Check]:
    """What has to hold of the groups of a run that has come to its end."""
    steps = [row["step"] for row in lines(run_dir / "metrics.jsonl") if "train/loss" in row]
    wrong, trained = [], Counter[str]()
    for step in range(1, sizes.steps + 1):
        rows = list(lines(run_dir / "rollouts" / f"step_{step:08d}.jsonl"))
        trained.update(row["id"] for row in rows)
        if Counter(row["group"] for row in rows) != dict.fromkeys(sizes.groups_of(step), sizes.attempts):
            wrong.append(step)
    state = json.loads((all_checkpoints(run_dir / "checkpoints")[-1] / "run.json").read_text())
    groups, samples = sizes.steps * sizes.groups, sizes.steps * sizes.groups * sizes.attempts
    counted = (state["step"], state["groups"], state["samples"])
    return [
        Check(
            f"metrics.jsonl has a line of training for each of {sizes.steps} steps, in order",
            steps == [*range(1, sizes.steps + 1)],
        ),
        Check(f"each step was trained on its own {sizes.groups} groups, wrong: {wrong or 'none'}", not wrong),
        Check(f"{len(trained)} attempts were trained on, each once", set(trained.values()) == {1} and len(trained) == samples),
        Check(f"the last checkpoint counts {counted} steps, groups and samples", counted == (sizes.steps, groups, samples)),
    ]


def sampled_once(run_dir: Path) -> list[Check]:
    """What has to hold of the attempts in a journal of which nothing was taken away."""
    kept = Counter(str(attempt) for path in segments(run_dir / "journal") for attempt in finished(path))
    again = [attempt for attempt, count in kept.items() if count > 1]
    unused = kept.keys() - {row["id"] for path in (run_dir / "rollouts").glob("*.jsonl") for row in lines(path)}
    return [
        Check(f"{len(kept)} attempts were finished, sampled again: {again or 'none'}", not again),
        Check(f"finished attempts that were not used: {sorted(unused) or 'none'}", not unused),
    ]


def same_run(killed: Path, straight: Path) -> list[Check]:
    """What has to be equal in a run that was killed and one that was given its journal."""
    weights = [files(each / "model", "*.safetensors") for each in (killed, straight)]
    rollouts = [files(each / "rollouts", "*.jsonl") for each in (killed, straight)]
    tensors = [shards(all_checkpoints(each / "checkpoints")[-1]) for each in (killed, straight)]
    numbers = [measured(each / "metrics.jsonl") for each in (killed, straight)]
    sampled = [sum(1 for path in segments(each / "journal") for _ in finished(path)) for each in (killed, straight)]
    size, stored = sum(map(len, weights[0].values())), len(tensors[0])
    count = sum(len(row) for row in numbers[0])
    return [
        Check(f"the exported weights are equal, {size:,} bytes", size > 0 and weights[0] == weights[1]),
        Check(
            f"so are the {stored} tensors of weights and optimizer in the last checkpoints",
            stored > 0 and tensors[0] == tensors[1],
        ),
        Check(f"so are the {len(rollouts[0])} files of rollouts and evaluations", rollouts[0] == rollouts[1]),
        Check(f"so are the {count:,} numbers in metrics.jsonl that are not of the clock", count > 0 and numbers[0] == numbers[1]),
        Check(f"the second run has sampled {sampled[1] - sampled[0]} attempts of its own", sampled[0] == sampled[1]),
    ]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; nothing where it is not there."""
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def files(directory: Path, pattern: str) -> dict[str, bytes]:
    """Names and contents."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob(pattern))}


def measured(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock says, and those that say nothing else left out."""
    rows = [{key: value for key, value in row.items() if key.partition("/")[0] not in CLOCK} for row in lines(path)]
    return [row for row in rows if row.keys() != {"step"}]


def shards(checkpoint: Path) -> list[str]:
    """Name, offset, shape, number format and hash of each tensor in a checkpoint; not where in its file it is."""
    stored = json.loads((checkpoint / "shards.json").read_text(encoding="utf-8"))
    return sorted(f"{file} {tensor[:5]}" for file, tensors in stored.items() for tensor in tensors)
