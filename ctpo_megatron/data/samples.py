"""From trajectories to training samples: label-aligned streams, built once and never shifted again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.types import Supports, TopK, TrainSample, TrajectoryGroup, Turn


def build_samples(
    group: TrajectoryGroup, advantages: Sequence[float | Sequence[float]], group_id: int, teacher: int | None = None
) -> list[TrainSample]:
    """One sample per trajectory of `group`, in order, each with those of its branches behind it.

    `advantages[i]` is that of trajectory i, see `build_sample`: a number for each token that the policy wrote, those in branches
    last, or one for all of them. `teacher`: that of the group, see `TrainSample`.
    """
    samples: list[TrainSample] = []
    for number, (trajectory, advantage) in enumerate(zip(group.trajectories, advantages, strict=True)):
        own, *others = _cut(advantage, trajectory.sampled_lengths)
        sample = build_sample(trajectory.prompt_ids, trajectory.turns, own, group_id, trajectory.routed_experts)
        made = [sample]
        for branch, value in zip(trajectory.branches, others, strict=True):
            made.append(build_sample(branch.prompt_ids, branch.turns, value, group_id, branch.routed_experts))
        made = [replace(each, teacher=teacher) for each in made]
        samples += [replace(each, attempt=number) for each in made] if others else made
    return samples


def rewarded(samples: Sequence[TrainSample], group: TrajectoryGroup, rewards: Sequence[float]) -> list[TrainSample]:
    """What `build_samples` made of `group`, with the reward of its trajectory at the last token that the policy wrote in each.

    `rewards[i]` is that of trajectory i. Nothing is rewarded in a sample without such a token.
    """
    owners = [number for number, trajectory in enumerate(group.trajectories) for _ in trajectory.sampled_lengths]
    return [replace(each, rewards=_at_the_end(each.mask, rewards[of])) for each, of in zip(samples, owners, strict=True)]


def _at_the_end(mask: Sequence[bool], reward: float) -> list[float]:
    """A stream with `reward` where `mask` is True for the last time, and zeros elsewhere."""
    last = max((place for place, wrote in enumerate(mask) if wrote), default=-1)
    return [reward if place == last else 0.0 for place in range(len(mask))]


def _cut(advantage: float | Sequence[float], lengths: Sequence[int]) -> list[float | Sequence[float]]:
    """The advantages of an attempt's tokens, sample by sample."""
    if isinstance(advantage, int | float) or len(lengths) == 1:
        return [advantage] * len(lengths)
    if len(advantage) != sum(lengths):
        raise ValueError(f"{len(advantage)} advantages for {sum(lengths)} tokens that the policy wrote; one for each is needed")
    ends = list(accumulate(lengths))
    return [advantage[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def build_sample(
    prompt_ids: Sequence[int],
    turns: Sequence[Turn],
    advantages: float | Sequence[float],
    group_id: int,
    routed_experts: NDArray[np.signedinteger] | None = None,
) -> TrainSample:
    """Label-aligned streams of a prompt and its turns, of length prompt + turns - 1; see `TrainSample` for an example.

    `advantages` are those of the tokens that the policy wrote, in order; a single number is that of each of them.
    `routed_experts` are those of all tokens but the last, as `Trajectory` holds them. Raises ValueError where a count is another,
    and without prompt tokens, since nothing would predict the first of the response.
    """
    if not prompt_ids:
        raise ValueError("a sample needs at least one prompt token")
    tokens = list(prompt_ids)
    prompt_labels = len(prompt_ids) - 1  # the first prompt token is no label
    mask = [False] * prompt_labels
    rollout_logp = [0.0] * prompt_labels
    versions = [-1] * prompt_labels
    for turn in turns:
        wrote = turn.role == "assistant"
        tokens += turn.token_ids
        mask += [wrote] * len(turn.token_ids)
        rollout_logp += turn.rollout_logp
        versions += turn.versions
    written = sum(mask)
    values = [advantages] * written if isinstance(advantages, int | float) else advantages
    if len(values) != written:
        raise ValueError(f"{len(values)} advantages for {written} tokens that the policy wrote; one for each is needed")
    remaining = iter(values)
    return TrainSample(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        mask=mask,
        rollout_logp=rollout_logp,
        versions=versions,
        advantages=[next(remaining) if wrote else 0.0 for wrote in mask],
        group=group_id,
        routed_experts=routed_experts,
        top_k=_top_k(prompt_labels, turns),
        supports=_supports(prompt_labels, turns),
        teacher_logp=_teacher_logp(prompt_labels, turns),
    )


def _top_k(prompt_labels: int, turns: Sequence[Turn]) -> TopK | None:
    """The top-k tokens at the place of each label; None where the run does not collect them."""
    k = next((turn.top_k.ids.shape[1] for turn in turns if turn.top_k is not None), None)
    if k is None:
        return None
    parts = [turn.top_k or TopK.unused(len(turn.token_ids), k) for turn in turns]
    return TopK.joined([TopK.unused(prompt_labels, k), *parts])


def _teacher_logp(prompt_labels: int, turns: Sequence[Turn]) -> list[float] | None:
    """The teacher's log-prob of each label, 0 where masked; None where no server was asked."""
    if all(turn.teacher_logp is None for turn in turns):
        return None
    return [0.0] * prompt_labels + [x for turn in turns for x in turn.teacher_logp or [0.0] * len(turn.token_ids)]


def _supports(prompt_labels: int, turns: Sequence[Turn]) -> Supports | None:
    """What could have been drawn at the place of each label; None where sampling was not truncated."""
    if all(turn.supports is None for turn in turns):
        return None
    parts = [turn.supports or Supports.none(len(turn.token_ids)) for turn in turns]
    return Supports.joined([Supports.none(prompt_labels), *parts])
