"""An attempt that has come to its end: what a reward sees of it, and the trajectory with what the reward said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.protocols import Outcome, Score, TokenText
from ctpo_megatron.types import Status, Trajectory


def outcome_of(attempt: Attempt, chat: TokenText) -> Outcome:
    """Returns what a reward sees of an attempt that has come to its end."""
    written = [chat.decode(turn.token_ids) for turn in attempt.assistant_turns]
    said = {"assistant": iter(written), "tool": iter(attempt.outputs)}
    return Outcome(
        "\n".join(written),
        tuple((turn.role, next(said[turn.role], "")) for turn in attempt.turns),
        attempt.response_length,
        attempt.tool_calls,
        attempt.tool_errors,
        attempt.status or Status.FINISHED,
    )


def trajectory_of(attempt: Attempt, chat: TokenText) -> Trajectory:
    """Returns what an attempt came to, without a reward."""
    return Trajectory(
        id=attempt.id,
        prompt_index=attempt.prompt_index,
        prompt_ids=attempt.prompt_ids,
        turns=attempt.turns,
        status=attempt.status or Status.FINISHED,
        text=chat.decode(attempt.tokens[len(attempt.prompt_ids) :], special=True),
        tool_calls=attempt.tool_calls,
        tool_errors=attempt.tool_errors,
        seconds=attempt.seconds,
        routed_experts=np.concatenate(attempt.routed_experts) if attempt.routed_experts else None,
        task_ids=attempt.task_ids,
    )


def outcome_as(text: str, made: Trajectory, chat: TokenText) -> Outcome:
    """Returns what a reward sees of `made`, where `text` is what is to be judged."""
    turns = tuple((turn.role, chat.decode(turn.token_ids)) for turn in made.turns)
    return Outcome(text, turns, made.response_length, made.tool_calls, made.tool_errors, made.status)


def with_score(made: Trajectory, score: Score) -> Trajectory:
    """Returns `made`, worth what `score` says."""
    return replace(
        made,
        reward=score.reward,
        undecided=score.undecided,
        given=score.given,
        why=score.why,
        terms=dict(score.terms),
        accuracy=score.accuracy,
    )
