"""Whether a run replays the experts that its engine chose. Needs neither torch nor megatron."""

from __future__ import annotations

from ctpo_megatron.config import RunConfig
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.types import RoutingShape


def replayed_routing(config: RunConfig) -> RoutingShape | None:
    """What a record of the model's routing looks like; None where `moe.routing_replay` is off or the model is dense."""
    return read_hf_config(config.model.path).routing if config.moe.routing_replay else None
