"""When copies of the trainer's state go into the memory of other processes, and whether a run can go on from one.

    step -> copied (the trainer does nothing else) -> handed over beside what follows -> whole: takes the place of the one before
                                                   -> failed: told, and the one before stays, if it is whole still
    trainer lost -> started again -> whole copy, no older than the newest checkpoint: given back
                                  -> none, or not as it was: told, and the checkpoint is read

The driver's part, a `RunState`, stays here beside it: a copy does not outlive the driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ctpo_megatron.checkpoints.files import all_checkpoints, step_of
from ctpo_megatron.errors import CopyLost, TrainerLost
from ctpo_megatron.loop.checkpoints import Resumable
from ctpo_megatron.loop.protocols import Copy, Keepers
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.memory_events import CopyGone, CopyKept, CopyLeftOut

T = TypeVar("T")


@dataclass(frozen=True)
class _Kept:
    state: RunState
    copy: Copy


class MemoryCopies:
    """The copies of one run, at most one of them whole and one under way. `resolved`: the run's configuration, read back."""

    def __init__(self, keepers: Keepers, every: int, resolved: dict[str, Any], emit: Emit) -> None:
        self._keepers, self._every, self._resolved, self._emit = keepers, every, resolved, emit
        self._kept: _Kept | None = None
        self._under_way: tuple[int, asyncio.Future[None]] | None = None

    def keep(self, state: RunState) -> None:
        """Begin a copy of the trainer, which is at `state`, where one is due; the trainer's next call waits until it is made.

        Raises what a copy before has failed with, unless it was told.
        """
        if not self._every or state.step % self._every:
            return
        if self._under_way is not None:
            step, task = self._under_way
            if not task.done():
                self._emit(CopyLeftOut(state.step, step))
                return
            task.result()
        self._under_way = state.step, asyncio.ensure_future(self._copied(state))

    async def recall(self, root: Path) -> Resumable | None:
        """Returns where the run goes on, after the trainer has taken its state from the copy.

        None where there is no whole copy, where a checkpoint in `root` is newer, and where the copy cannot be used, which is
        told; the trainer is as it was then. Raises TrainerLost for a rank that is lost meanwhile.
        """
        await self._break_off()
        kept, self._kept = self._kept, None  # what cannot be used once is not tried again
        if kept is None or kept.state.step < max(map(step_of, all_checkpoints(root)), default=0):
            return None
        try:
            await self._keepers.recall(kept.copy)
        except CopyLost as error:
            self._emit(CopyGone(kept.state.step, str(error).splitlines()[0], None))
            return None
        self._kept = kept
        return Resumable(root, kept.state, {"scheduler_steps": kept.copy.scheduler_steps}, self._resolved, in_memory=True)

    def forget(self) -> None:
        """Use none of the copies that there are: the run goes back behind them."""
        self._kept = None

    async def guarding(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what `work` returns; when it ends, the copy under way is broken off."""
        try:
            return await work
        finally:
            await self._break_off()

    async def _copied(self, state: RunState) -> None:
        begun = time.monotonic()
        try:
            copy = await self._keepers.copy(state.step, None if self._kept is None else self._kept.copy)
            self._kept = _Kept(state, copy)  # before the other goes
            await self._keepers.retain(copy)
        except TrainerLost:
            return  # whoever works with it is told
        except CopyLost as error:
            if self._kept is not None and not self._keepers.holds(self._kept.copy):
                self._kept = None
            self._emit(CopyGone(state.step, str(error), None if self._kept is None else self._kept.state.step))
            return
        self._emit(CopyKept(state.step, time.monotonic() - begun, copy.stood_s, copy.size))

    async def _break_off(self) -> None:
        if self._under_way is not None:
            _, task = self._under_way
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._under_way = None
