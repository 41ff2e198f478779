"""Copies of the trainer's state in the memory of other processes."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat

from ctpo_megatron.config.base import Section


class MemoryConfig(Section):
    """A trainer that has lost a rank goes on from such a copy, where it is newer than the newest checkpoint."""

    every: NonNegativeInt = 0
    """Copy after every so many training steps. 0: never. Two copies take twice the size of a checkpoint in the hosts' memory, so
    it is asked for and not there by itself."""
    timeout_s: PositiveFloat = 600.0
    """How long handing a copy over may take; one that takes longer is given up, and the run goes on."""
