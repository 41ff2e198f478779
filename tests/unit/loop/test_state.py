"""The driver's part of a checkpoint: what comes back, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.loop.admission import Admission
from ctpo_megatron.loop.state import OpenGroup, RunState
from ctpo_megatron.types import AttemptId, GroupId, Prompt

STATE = RunState(step=12, groups=48, cursor={"seed": 1, "epoch": 2, "position": 3}, accuracies={9: 0.25, 10: 0.5, 0: 0.0})


def test_what_is_dumped_comes_back_through_json() -> None:
    assert RunState.parse(json.loads(json.dumps(STATE.dump(), allow_nan=False)), "run.json") == STATE
    assert list(STATE.dump()["accuracies"]) == ["0", "9", "10"]
    assert replace(STATE, samples=7).dump()["samples"] == 7
    open_groups = (OpenGroup(41, "7", 11), OpenGroup(47, "2", 12))
    going_on = replace(STATE, open=open_groups, owed=(8, 10))
    assert RunState.parse(json.loads(json.dumps(going_on.dump())), "run.json") == going_on
    assert (STATE.oldest_group, going_on.oldest_group) == (48, 41)
    remembering = replace(STATE, alarms={"rows": 3, "state": [[1.5, None], {"x": [1, 2.0]}]})
    assert RunState.parse(json.loads(json.dumps(remembering.dump())), "run.json") == remembering
    earlier = {key: value for key, value in STATE.dump().items() if key not in ("samples", "owed", "open", "alarms")}
    assert RunState.parse(earlier, "run.json") == STATE  # of releases that did not know of them
    with pytest.raises(FrozenInstanceError):
        STATE.step = 13  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": -1}, "step: .*greater than or equal to 0"),
        ({"step": "12"}, "step: .*valid integer"),
        ({"groups": None}, "groups: "),
        ({"cursor": 3}, "cursor: "),
        ({"accuracies": {"x": 0.5}}, "accuracies.x"),
        ({"accuracies": {"1": math.nan}}, "accuracies.1"),
        ({"version": 2}, "version: "),
        ({"samples": -1}, "samples: "),
        ({"open": [{"number": 3, "prompt": 4, "version": 1}]}, "open.0.prompt: "),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"there/run.json: this is not the state of a run: {words}"):
        RunState.parse(STATE.dump() | change, "there/run.json")
    with pytest.raises(CheckpointError, match="groups: "):
        RunState.parse({key: value for key, value in STATE.dump().items() if key != "groups"}, "there")
    with pytest.raises(CheckpointError, match="it: "):
        RunState.parse([1], "there")


def test_a_run_goes_on_with_what_is_open_and_the_next_prompts() -> None:
    """Two groups a step; the third step is being sampled while the first is trained on."""
    prompts = [Prompt(i, ({"role": "user", "content": str(i)},), "1") for i in range(5)]
    admission = Admission(PromptSampler(prompts, seed=3), groups=10)
    admitted = [admission.next(version) for version in (7, 7, 7, 7)]
    assert [str(group.id) for group in admitted] == [f"g000000{n}" for n in (10, 11, 12, 13)]
    position = admission.position(admitted[2:])
    later = [admission.next(8) for _ in range(2)]
    assert position.groups == 14
    again = Admission(PromptSampler.restore(prompts, position.cursor), position.groups, position.open)
    assert again.reopened == (*admitted[2:],)
    assert [again.next(8) for _ in range(2)] == later


def test_ids_name_one_thing_each() -> None:
    assert str(AttemptId(GroupId(12), 3)) == "g00000012.3"
    assert str(AttemptId(GroupId(12, evaluation=4), 0)) == "e00000004-g00000012.0"
    assert str(AttemptId(GroupId(12, evaluation=4, benchmark="aime25"), 0)) == "e00000004-aime25-g00000012.0"
    ids = {
        GroupId(n, step, name)
        for n in range(3)
        for step in (None, 0, 1)
        for name in ("", "a", "b")
        if step is not None or not name
    }
    assert len({str(each) for each in ids}) == len(ids) == 21
