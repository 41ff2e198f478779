"""What the loop needs from the rest of the system."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.types import Prompt, TrajectoryGroup


class Trainer(Protocol):
    """All ranks of the trainer, seen as one."""

    async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
        """One optimizer step per batch on trajectories of policy `version`. Returns reduced statistics."""
        ...

    async def supervise(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step of supervised training."""
        ...

    async def save(self, directory: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint of everything needed to go on, with `state` beside it."""
        ...

    async def load(self, directory: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns its `state`."""
        ...

    async def save_hf(self, directory: Path) -> None:
        """Write the model in Hugging Face format."""
        ...


class Publisher(Protocol):
    """Brings the trainer's weights to the inference servers."""

    async def publish(self, version: int) -> float:
        """After it returns every new token is sampled by `version`. Returns seconds."""
        ...


class Rollouts(Protocol):
    """Makes judged trajectories."""

    async def group(self, prompt: Prompt, *, size: int, temperature: float) -> TrajectoryGroup:
        """`size` attempts at one prompt."""
        ...
