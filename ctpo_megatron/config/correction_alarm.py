"""When the weights of a correction count as shrunk."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ctpo_megatron.config.base import Section

Share = Annotated[float, Field(ge=0, lt=1)]


class CorrectionAlarm(Section):
    """Tells of a correction whose weights leave little of a batch (docs/mismatch.md); the run goes on as it is."""

    mean: Share = 0.5
    """Smallest mean weight of a step's tokens, as weights are used. 0: not looked at."""
    sample_size: Share = 0.1
    """Smallest effective share of a step's tokens, (sum of weights)^2 / (tokens * sum of squares). 0: not looked at."""
