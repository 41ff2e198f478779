"""Trajectories for people and programs: a line of JSON each in RUN_DIR/rollouts, and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ctpo_megatron.errors import storing
from ctpo_megatron.record.files import Through, at_once, jsonable
from ctpo_megatron.types import Prompt, Trajectory, TrajectoryGroup, Turn

LONGEST = 20_000  # characters of a text in TensorBoard's files
# of a trajectory's fields, from those that are copied into its row
_LEFT_OUT = ("id", "routed_experts", "prompt_ids", "turns", "branches", "task_ids")


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
            with path.open("wb") as file:
                for group in groups:
                    for trajectory in group.trajectories:
                        file.write(_line(as_row(group.prompt, trajectory)))


def _line(row: dict[str, Any]) -> bytes:
    """Returns `row` as a line of JSON.

    Text is ASCII, since some readers end a line at more characters than a line feed. Streams are numbers, which msgspec writes
    ten times as fast as Python.
    """
    turns = row.pop("turns")
    return json.dumps(row)[:-1].encode() + b', "turns": ' + msgspec.json.encode(turns) + b"}\n"


def as_row(prompt: Prompt, trajectory: Trajectory) -> dict[str, Any]:
    """Returns a trajectory as JSON values, its ids as `id` and `group`; what the engine recorded for the trainer is left out.

    Streams of tokens are the trajectory's own lists, not copies: of all that the controller does for a token, copying them one by
    one took longest.
    """
    plain = {each.name: getattr(trajectory, each.name) for each in fields(trajectory) if each.name not in _LEFT_OUT}
    row = {"id": str(trajectory.id), "group": str(trajectory.id.group), "answer": prompt.answer, **plain}
    others = [{"prompt_ids": each.prompt_ids, "turns": [_turn(turn) for turn in each.turns]} for each in trajectory.branches]
    row = {**jsonable(row), "prompt_ids": trajectory.prompt_ids, **({"branches": others} if others else {})}
    return row | {"turns": [_turn(turn) for turn in trajectory.turns]}


def _turn(turn: Turn) -> dict[str, Any]:
    logp = turn.rollout_logp if all(map(math.isfinite, turn.rollout_logp)) else jsonable(turn.rollout_logp)
    return {"role": turn.role, "token_ids": turn.token_ids, "rollout_logp": logp, "versions": turn.versions}


def as_markdown(prompt: Prompt, trajectory: Trajectory) -> str:
    """Returns a trajectory for a person, for TensorBoard's text panel. What others wrote is shown as it is, never as Markdown."""
    counts = f"{trajectory.response_length} tokens, {trajectory.tool_calls} tool calls"
    head = f"**reward {trajectory.reward:g}**, {trajectory.status}, {counts}, {trajectory.id}"
    asked, known = str(prompt.messages[-1]["content"]), str(prompt.answer)
    parts = (head, "asked:", _as_it_is(asked), "known answer:", _as_it_is(known), "---", _as_it_is(trajectory.text))
    return "\n\n".join(parts)


def _as_it_is(text: str) -> str:
    """Returns text as a block of code, of which Markdown leaves everything alone; what is too long lacks its middle."""
    if len(text) > LONGEST:
        left_out = f"\n[{len(text) - LONGEST:,} characters are left out here; RUN_DIR/rollouts has all]\n"
        text = text[: LONGEST // 2] + left_out + text[-LONGEST // 2 :]
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # Markdown ends lines at these
    return "\n".join(f"    {line}" for line in lines)
