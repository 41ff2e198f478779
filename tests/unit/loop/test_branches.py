"""Attempts with branches in what a run counts and decides."""

from __future__ import annotations

from dataclasses import replace

from ctpo_megatron.loop.admission import Admitted
from ctpo_megatron.loop.composition import oldest_version
from ctpo_megatron.loop.report import StepCost
from ctpo_megatron.loop.statistics import rollout_metrics
from ctpo_megatron.loop.tally import group_line
from ctpo_megatron.types import End, Status, TrajectoryGroup
from tests.support.trajectories import GROUP, PROMPT, branched, group_of, trajectory


def group() -> TrajectoryGroup:
    """Turns of version 7, but for one of a branch, which is of version 4."""
    made = branched(1.0, ([9, 1], [[3], [4], [5, 6]]), ([9], [[7]]))
    for turn in made.all_turns:
        if turn.role == "assistant":
            turn.versions = [7] * len(turn.token_ids)
    made.branches[0].turns[2].versions = [4, 4]
    other = replace(trajectory(0.0, [1, 3]), status=Status.UNANSWERED)
    other.turns[0].versions = [7, 7]
    return group_of(made, other)


def test_what_a_step_costs():
    cost = StepCost.of([group()], {"rollout": 1.0, "train": 1.0}, 2.0)
    assert (cost.sampled_tokens, cost.trained_tokens) == (6 + 2, (1 + 2) + (2 + 4) + (1 + 1) + (1 + 2))


def test_what_is_measured():
    metrics = rollout_metrics([group()], 8)
    assert metrics["rollout/branches"] == 1.0
    assert metrics["rollout/unanswered"] == 0.5
    assert metrics["rollout/truncated"] == 0.5
    assert metrics["rollout/turns"] == (4 + 1) / 2
    assert metrics["rollout/sampled_tokens"] == (6 + 2) / 2
    assert metrics["rollout/response_tokens"] == 2.0
    assert metrics["rollout/staleness_max"] == 4


def test_the_oldest_token_counts_wherever_it_is():
    assert oldest_version(group()) == 4
    line = group_line(Admitted(GROUP, PROMPT, 4), 8, End.TRAINED, "", group())
    assert [each["versions"] for each in line["attempts"]] == [[4, 7], [7, 7]]
