"""Trajectories and groups from token ids alone, for the tests of advantages."""

from __future__ import annotations

from ctpo_megatron.types import AttemptId, Branch, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn

PROMPT = Prompt(0, ({"role": "user", "content": "q"},), "1")
GROUP = GroupId(0)
ATTEMPT = AttemptId(GROUP, 0)


def trajectory(reward: float, *turns: list[int]) -> Trajectory:
    """An attempt from the token ids of its turns; the policy writes the first, a tool answers, and so on."""
    roles = ["assistant" if number % 2 == 0 else "tool" for number in range(len(turns))]
    made = [Turn(role, ids, [0.0] * len(ids), [0] * len(ids)) for role, ids in zip(roles, turns, strict=True)]
    return Trajectory(0, [9], made, Status.FINISHED, reward=reward, id=ATTEMPT)


def group_of(*trajectories: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup(PROMPT, list(trajectories), id=GROUP)


def branched(reward: float, *branches: tuple[list[int], list[list[int]]]) -> Trajectory:
    """An attempt of one turn of two tokens, with branches from their prompts and turns."""
    made = trajectory(reward, [1, 2])
    made.branches = [Branch(prompt, trajectory(0.0, *turns).turns) for prompt, turns in branches]
    return made
