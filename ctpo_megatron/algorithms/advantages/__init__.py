"""Rewards become advantages, on the host and as pure functions of numbers; `compute_advantages` is the way in."""

from ctpo_megatron.algorithms.advantages.compute import compute_advantages
from ctpo_megatron.algorithms.advantages.group import group_advantages
from ctpo_megatron.algorithms.advantages.shaping import shaped_rewards

__all__ = ["compute_advantages", "group_advantages", "shaped_rewards"]
