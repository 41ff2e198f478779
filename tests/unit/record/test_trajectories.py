"""Rows of trajectories: what they hold, strict JSON of it, and that it is not copied token by token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from tensorboard.plugin_util import markdown_to_safe_html

from ctpo_megatron.record.trajectories import LONGEST, TrajectoryFiles, as_markdown, as_row
from ctpo_megatron.types import AttemptId, Branch, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn

PROMPT = Prompt(3, ({"role": "user", "content": "x"},), "42")
TURNS = [Turn("assistant", [5, 6], [-0.5, float("nan")], [1, 2]), Turn("tool", [9], [0.0], [-1])]


def trajectory() -> Trajectory:
    routed = np.zeros((4, 1, 1), np.int8)
    known = {"text": "é\n\u2028", "reward": float("-inf"), "seconds": 1.25e-7, "routed_experts": routed, "given": "7"}
    return Trajectory(3, [1, 2], TURNS, Status.LENGTH, **known, id=AttemptId(GroupId(7), 2))


def test_a_row_is_strict_json_of_all_but_what_was_recorded_for_the_trainer(tmp_path: Path) -> None:
    TrajectoryFiles(tmp_path).write("step", 4, [TrajectoryGroup(PROMPT, [trajectory()], id=GroupId(7))])
    (line,) = (tmp_path / "rollouts" / "step_00000004.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {
        **{"id": "g00000007.2", "group": "g00000007", "answer": "42", "prompt_index": 3, "status": "length", "text": "é\n\u2028"},
        **{"reward": "-Infinity", "tool_calls": 0, "tool_errors": 0, "seconds": 1.25e-7, "undecided": False, "given": "7"},
        **{"why": "", "terms": {}, "accuracy": None},
        "prompt_ids": [1, 2],
        "turns": [
            {"role": "assistant", "token_ids": [5, 6], "rollout_logp": [-0.5, "NaN"], "versions": [1, 2]},
            {"role": "tool", "token_ids": [9], "rollout_logp": [0.0], "versions": [-1]},
        ],
    }


def test_streams_are_the_trajectorys_own() -> None:
    (first, second), whole = as_row(PROMPT, trajectory())["turns"], trajectory()
    assert first["token_ids"] is whole.turns[0].token_ids
    assert second["rollout_logp"] is whole.turns[1].rollout_logp


def test_branches_are_in_the_row_where_there_are_any() -> None:
    made = trajectory()
    made.branches = [Branch([1], TURNS[:1])]
    (branch,) = as_row(PROMPT, made)["branches"]
    assert branch == {"prompt_ids": [1], "turns": as_row(PROMPT, made)["turns"][:1]}
    assert "branches" not in as_row(PROMPT, trajectory())


def test_what_others_wrote_does_not_come_to_life_in_tensorboard() -> None:
    """Markdown ends lines at carriage returns too, and its HTML would be let through as far as it is harmless."""
    hostile = "x\r# head\r\n**bold** <b>b</b> ![i](http://a/i.png)\n<script>s</script>"
    prompt = Prompt(0, ({"role": "user", "content": hostile},), f"1`{hostile}")
    html = markdown_to_safe_html(
        as_markdown(prompt, Trajectory(0, [1], [], Status.FINISHED, text=hostile, id=AttemptId(GroupId(7), 2)))
    )
    assert set(re.findall(r"<(\w+)", html)) == {"p", "strong", "pre", "code", "hr"}
    assert html.count("<strong>") == 1
    assert html.count("&lt;script&gt;") == 3


def test_long_trajectories_lack_their_middle_and_say_so() -> None:
    text = "a" * LONGEST + "b" * LONGEST
    prompt = Prompt(0, ({"role": "user", "content": "q"},), "1")
    shown = as_markdown(prompt, Trajectory(0, [1], [], Status.FINISHED, text=text, id=AttemptId(GroupId(7), 2)))
    assert f"[{LONGEST:,} characters are left out here; RUN_DIR/rollouts has all]" in shown
    assert shown.count("a" * (LONGEST // 2)) == 1
    assert shown.endswith("b" * (LONGEST // 2))
