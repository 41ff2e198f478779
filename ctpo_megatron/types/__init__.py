"""The words of the system: what flows from a prompt to a training sample. Plain lists, numbers and arrays, no tensors.

    Prompt -> Trajectory (turns, status, reward) -> TrajectoryGroup -> TrainSample

A token id enters a `Turn` exactly once, where it was sampled or where tool text was tokenised, and is copied from there; no
text is ever tokenised a second time.
"""

from __future__ import annotations

from ctpo_megatron.types.attempts import (
    AttemptId,
    Branch,
    FailedAttempt,
    GroupId,
    Prompt,
    Status,
    Trajectory,
    TrajectoryGroup,
    Turn,
)
from ctpo_megatron.types.calls import Parsed, ParsedCall
from ctpo_megatron.types.samples import TrainSample
from ctpo_megatron.types.sampling import WHOLE, Generation, RoutingShape, Supports, TopK, Truncation
from ctpo_megatron.types.steps import Composition, End, Fate

__all__ = [
    "WHOLE",
    "AttemptId",
    "Branch",
    "Composition",
    "End",
    "FailedAttempt",
    "Fate",
    "Generation",
    "GroupId",
    "Parsed",
    "ParsedCall",
    "Prompt",
    "RoutingShape",
    "Status",
    "Supports",
    "TopK",
    "TrainSample",
    "Trajectory",
    "TrajectoryGroup",
    "Truncation",
    "Turn",
]
