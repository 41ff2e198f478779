"""Trajectories for people and programs: a line of JSON each in RUN_DIR/rollouts, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import storing
from ctpo_megatron.record.files import Through, at_once, jsonable
from ctpo_megatron.types import Prompt, Trajectory, TrajectoryGroup


class TrajectoryFiles:
    """The files RUN_DIR/rollouts/KIND_STEP.jsonl. Those of `first_step` or later, which an earlier attempt wrote, are deleted.

    `through`: how files are written, each as a whole.
    """

    def __init__(self, run_dir: Path, first_step: int = 0, through: Through = at_once) -> None:
        self._directory, self._through = run_dir / "rollouts", through
        for path in self._directory.glob("*_*.jsonl"):
            number = path.stem.rpartition("_")[2]
            if number.isdigit() and int(number) >= first_step:
                with storing(path):
                    path.unlink()

    def write(self, kind: str, step: int, groups: Iterable[TrajectoryGroup]) -> None:
        """Write all trajectories of `groups`. `kind` is `step` or `eval`, `step` the number of training steps by then.

        Raises StorageError where the disk does not take them.
        """
        self._through(partial(self._write, self._directory / f"{kind}_{step:08d}.jsonl", list(groups)))

    def _write(self, path: Path, groups: Sequence[TrajectoryGroup]) -> None:
        with storing(path):
            self._directory.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for group in groups:
                    for trajectory in group.trajectories:
                        file.write(json.dumps(as_row(group.prompt, trajectory)) + "\n")


def as_row(prompt: Prompt, trajectory: Trajectory) -> dict[str, Any]:
    """Returns a trajectory as JSON values, its ids as `id` and `group`; what the engine recorded for the trainer is left out."""
    turns = [replace(turn, top_k=None, supports=None) for turn in trajectory.turns]
    plain = asdict(replace(trajectory, routed_experts=None, turns=turns))
    for key in ("routed_experts", "id"):
        del plain[key]
    for turn in plain["turns"]:
        del turn["top_k"], turn["supports"]
    row: dict[str, Any] = jsonable(plain)
    return {"id": str(trajectory.id), "group": str(trajectory.id.group), "answer": prompt.answer, **row}


def as_markdown(prompt: Prompt, trajectory: Trajectory) -> str:
    """Returns a trajectory for a person, for TensorBoard's text panel."""
    question = prompt.messages[-1]["content"]
    return (
        f"**reward {trajectory.reward:g}**, answer `{prompt.answer}`, {trajectory.status}, "
        f"{trajectory.tool_calls} tool calls, {trajectory.id}\n\n"
        f"    {_indent(question)}\n\n---\n\n    {_indent(trajectory.text)}\n"
    )


def _indent(text: str) -> str:
    return text.replace("\n", "\n    ")
