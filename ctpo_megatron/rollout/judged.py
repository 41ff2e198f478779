"""A trajectory and its verdict: what a reward sees of it, and the trajectory with what the reward said."""

from __future__ import annotations

from dataclasses import replace

from ctpo_megatron.rollout.protocols import Chat, Outcome, Score
from ctpo_megatron.types import Trajectory


def outcome_as(text: str, made: Trajectory, chat: Chat) -> Outcome:
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
