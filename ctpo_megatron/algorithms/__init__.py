"""Objectives as pure functions of tensors: advantages, prefix ratios, surrogate losses, aggregation."""

from ctpo_megatron.algorithms.advantages import group_advantages
from ctpo_megatron.algorithms.loss import PolicyLoss, nll_loss, policy_loss
from ctpo_megatron.algorithms.scan import LocalScan, PrefixSums, Scan

__all__ = ["LocalScan", "PolicyLoss", "PrefixSums", "Scan", "group_advantages", "nll_loss", "policy_loss"]
