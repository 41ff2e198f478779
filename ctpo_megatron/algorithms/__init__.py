"""Objectives as pure functions of tensors: scans, surrogate losses, aggregation, advantages."""

from ctpo_megatron.algorithms.advantages import group_advantages
from ctpo_megatron.algorithms.aggregation import sequence_weights
from ctpo_megatron.algorithms.loss import PolicyLoss, policy_loss, recipe_loss
from ctpo_megatron.algorithms.recipe import Recipe, algorithm_recipe, make_recipe
from ctpo_megatron.algorithms.reference import reference_penalty
from ctpo_megatron.algorithms.scan import Channel, LocalScan, Scan, Scanned
from ctpo_megatron.algorithms.statistics import Stats, Weighted, raise_if_nonfinite
from ctpo_megatron.algorithms.supervised import nll_loss
from ctpo_megatron.algorithms.tokens import Seen, Support

__all__ = [
    "Channel",
    "LocalScan",
    "PolicyLoss",
    "Recipe",
    "Scan",
    "Scanned",
    "Seen",
    "Stats",
    "Support",
    "Weighted",
    "algorithm_recipe",
    "group_advantages",
    "make_recipe",
    "nll_loss",
    "policy_loss",
    "raise_if_nonfinite",
    "recipe_loss",
    "reference_penalty",
    "sequence_weights",
]
