"""When a run saves, waits for what it saved, and lets old checkpoints go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctpo_megatron.checkpoints.files import prune
from ctpo_megatron.config.train import CheckpointConfig
from ctpo_megatron.errors import CtpoError
from ctpo_megatron.loop.protocols import Trainer


class Checkpoints:
    """The checkpoints of one run, at most one of them being written.

    save -> (training goes on) -> verified and named -> older ones go
                               -> failed: `check` before the next step ends the run with that error
    """

    def __init__(self, trainer: Trainer, root: Path, config: CheckpointConfig, state: Callable[[int], dict[str, Any]]) -> None:
        self.root = root
        self._trainer, self._config, self._state = trainer, config, state
        self._writing: asyncio.Task[None] | None = None

    async def save(self, step: int) -> None:
        """Save the state after `step` training steps, once the save before is settled."""
        await self.settle()
        begun = time.monotonic()
        await self._trainer.save(checkpoint_directory(self.root, step), self._state(step), background=self._config.background)
        self._writing = asyncio.ensure_future(self._finish(step, begun))
        if not self._config.background:
            await self.settle()

    def check(self) -> None:
        """Raise what the save in the background failed with, if it has failed."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    async def settle(self) -> None:
        """Wait for the save in flight; the trainer bounds the wait. Raises what it failed with, once."""
        writing = self._writing
        if writing is not None:
            await asyncio.wait([writing])  # when this is cancelled, the save is still there for `abandon`
            self._writing = None
            writing.result()

    async def abandon(self) -> None:
        """`settle` for a run that ends for another reason: what goes wrong here is told, and the reason stays the reason."""
        try:
            await self.settle()
        except CtpoError as error:
            print(f"the checkpoint in flight is lost: {error}", flush=True)

    async def _finish(self, step: int, begun: float) -> None:
        await self._trainer.settle()
        print(f"checkpoint of step {step} verified after {time.monotonic() - begun:.1f} s", flush=True)
        prune(self.root, self._config.keep)


def checkpoint_directory(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` training steps lives."""
    return root / f"step_{step:08d}"
