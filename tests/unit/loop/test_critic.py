"""What a critic gets from the driver: every sample, with the reward of its trajectory at the policy's last token in it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from ctpo_megatron.config import RunConfig
from ctpo_megatron.data.packing import FILLER, pack
from ctpo_megatron.data.samples import build_samples, rewarded
from ctpo_megatron.loop.train import make_batches
from tests.support.trajectories import branched, group_of, trajectory


def config(advantage: dict[str, Any], **algorithm: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": "r",
            "model": {"path": "m"},
            "data": {"train": "d"},
            "train": {"prompts_per_step": 2, "optimizer_steps": 1},
            "algorithm": {"advantage": advantage, **algorithm},
        }
    )


def test_the_reward_is_at_the_last_token_that_the_policy_wrote() -> None:
    """Of a trajectory that ends with a tool's output, of its branch, and of one in which the policy wrote nothing."""
    made = branched(0.5, ([9, 9], [[3, 4], [5], [6, 7]]))
    group = group_of(trajectory(2.0, [1, 2], [8, 8]), made, trajectory(1.0, []))
    samples = build_samples(group, [0.0] * 3, 0)
    found = rewarded(samples, group, [2.0, 0.5, 1.0])
    assert [sample.rewards for sample in found] == [[0.0, 2.0, 0.0, 0.0], [0.0, 0.5], [0.0] * 5 + [0.5], []]
    assert [replace(sample, rewards=None) for sample in found] == samples


def test_a_critic_gets_every_sample_of_equal_rewards() -> None:
    groups = [group_of(trajectory(1.0, [1, 2]), trajectory(1.0, [3])), group_of(trajectory(0.0, [4]), trajectory(0.0, [5]))]
    for spare in (True, False):
        (batch,) = make_batches(groups, config({"type": "gae"}), spare=spare)
        assert batch.ids() == [0, 1, 2, 3]
        assert not batch.spared
        ((micro,),) = batch.micro_batches
        assert micro.tokens.rewards is not None
        assert micro.tokens.rewards.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
        assert not micro.tokens.advantages.any()


def test_rewards_are_those_that_were_shaped() -> None:
    group = group_of(trajectory(1.0, [1, 2, 3, 4]), trajectory(1.0, [1]))
    shaping = {"overlong": {"max_tokens": 4, "buffer": 2}}
    (batch,) = make_batches([group, group], config({"type": "gae"}, shaping=shaping))
    ((micro,),) = batch.micro_batches
    assert micro.tokens.rewards is not None
    assert micro.tokens.rewards.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0] * 2


def test_without_a_critic_there_is_no_stream_of_rewards() -> None:
    group = group_of(trajectory(1.0, [1]), trajectory(0.0, [2]))
    (batch,) = make_batches([group, group], config({"type": "group"}))
    assert batch.micro_batches[0][0].tokens.rewards is None


def test_ranks_without_samples_have_the_stream_too() -> None:
    """All micro-batches of a step are of one kind, or the ranks would not come to the same collective calls."""
    sample = replace(FILLER, mask=[True], versions=[0], rewards=[1.0])
    rows = pack([sample], dp=2, max_tokens=8)
    assert [row[0].tokens.rewards.tolist() for row in rows if row[0].tokens.rewards is not None] == [[1.0], [0.0]]
    assert rows[0][0].tokens.rewards is not None
    assert rows[0][0].tokens.rewards.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": {"aggregation": "balanced"}}, "'balanced' weighs sequences by the signs of their advantages"),
        ({"model": {"path": "m", "adapter": {}}}, "model.adapter trains adapters alone; set model.adapter to null"),
        ({"rollout": {"dynamic": {"max_refills": 4}}}, "max_refills=4 replaces groups whose rewards are all equal"),
        ({"advantage": {"lam": 1.5}}, "less than or equal to 1"),
        ({"advantage": {"gamma": -0.1}}, "greater than or equal to 0"),
        ({"advantage": {"critic": {"clip": 0.0}}}, "greater than 0"),
        ({"advantage": {"critic": {"coeff": -1.0}}}, "greater than 0"),
        ({"advantage": {"critic": {"warmup_steps": -1}}}, "greater than or equal to 0"),
        ({"advantage": {"critic": {"weights": "own"}}}, "'head' or 'shared'"),
    ],
)
def test_what_a_critic_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    whole: dict[str, Any] = config({"type": "gae"}).model_dump(mode="json")
    for key, change in changes.items():
        place = whole["algorithm"]["advantage"] if key == "advantage" else whole[key]
        place |= change
    with pytest.raises(ValueError, match=re.escape(words)):
        RunConfig.model_validate(whole)
