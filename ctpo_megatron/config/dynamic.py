"""Dynamic sampling: groups that teach nothing are replaced."""

from __future__ import annotations

from pydantic import NonNegativeInt

from ctpo_megatron.config.base import Section


class DynamicConfig(Section):
    """Groups whose rewards are all equal are replaced by further prompts. What is dropped is in the ledger (docs/rollouts.md)."""

    max_refills: NonNegativeInt = 0
    """How many groups may be replaced for one step; beyond that, groups with equal rewards are trained on as they are. 0: none is
    replaced."""
