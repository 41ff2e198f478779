"""What is sent to each inference server, and when a request is taken elsewhere."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ctpo_megatron.config.base import Section


class MovingConfig(Section):
    """When a request leaves a server that is far behind the others. It goes on elsewhere from the tokens in hand."""

    factor: Annotated[float, Field(gt=1)] = 4.0
    """A request leaves once it has taken so many times what the other servers would take for all tokens that it may have: by the
    median over them of their median seconds per token, over their last 32 answers."""
    least_s: PositiveFloat = 30.0
    """It leaves after this time at the earliest, so that a publication of weights is not taken for a slow server."""
    most: PositiveInt = 1
    """So often at most for one turn of the model."""


class TrafficConfig(Section):
    """Requests in flight at each server."""

    per_server: PositiveInt | Literal["auto"] | None = None
    """The most requests at one server at a time. auto: as many as it takes without a queue of its own and without running out of
    KV cache, found out while it works. null: only `rollout.concurrency` bounds them."""
    look_s: PositiveFloat = 1.0
    """Time between two looks at the servers' queues and caches; they are recorded as `servers/...`. At least 15 s where
    `per_server` is not auto, since only the record needs them then."""
    moving: MovingConfig | None = None
    """When a request leaves a slow server. null: never."""
