"""From trajectories to training samples: label-aligned streams, built once and never shifted again."""

from __future__ import annotations

from collections.abc import Sequence

from ctpo_megatron.types import TrainSample, TrajectoryGroup, Turn


def build_samples(group: TrajectoryGroup, advantages: Sequence[float], group_id: int) -> list[TrainSample]:
    """One sample per trajectory of `group`, in order; `advantages[i]` goes to every token the policy wrote in trajectory i."""
    return [
        build_sample(trajectory.prompt_ids, trajectory.turns, advantage, group_id)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True)
    ]


def build_sample(prompt_ids: Sequence[int], turns: Sequence[Turn], advantage: float, group_id: int) -> TrainSample:
    """Label-aligned streams of a prompt and its turns, of length prompt + turns - 1; see `TrainSample` for an example.

    Raises ValueError without prompt tokens, since nothing would predict the first token of the response.
    """
    if not prompt_ids:
        raise ValueError("a sample needs at least one prompt token")
    tokens = list(prompt_ids)
    prompt_labels = len(prompt_ids) - 1  # the first prompt token is no label
    mask = [False] * prompt_labels
    logprobs = [0.0] * prompt_labels
    versions = [-1] * prompt_labels
    for turn in turns:
        wrote = turn.role == "assistant"
        tokens += turn.token_ids
        mask += [wrote] * len(turn.token_ids)
        logprobs += turn.logprobs
        versions += turn.versions
    return TrainSample(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        loss_mask=mask,
        rollout_logprobs=logprobs,
        policy_versions=versions,
        advantages=[advantage if wrote else 0.0 for wrote in mask],
        group=group_id,
    )
