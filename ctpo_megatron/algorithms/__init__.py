"""Objectives as pure functions of tensors: scans, surrogate losses, aggregation, advantages."""

from ctpo_megatron.algorithms.advantages import group_advantages
from ctpo_megatron.algorithms.aggregation import sequence_weights
from ctpo_megatron.algorithms.loss import PolicyLoss, policy_loss
from ctpo_megatron.algorithms.statistics import raise_if_nonfinite
from ctpo_megatron.algorithms.reference import reference_penalty
from ctpo_megatron.algorithms.scan import Channel, LocalScan, Scan, Scanned
from ctpo_megatron.algorithms.supervised import nll_loss
from ctpo_megatron.algorithms.tokens import Support

__all__ = [
    "Channel",
    "LocalScan",
    "PolicyLoss",
    "Scan",
    "Scanned",
    "Support",
    "group_advantages",
    "nll_loss",
    "policy_loss",
    "raise_if_nonfinite",
    "reference_penalty",
    "sequence_weights",
]
