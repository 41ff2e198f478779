"""Steps whose loss or gradient is not finite: dumped, told, counted, and at some point the end of the run.

update -> done                     the count begins anew
       -> abandoned by the ranks   dump -> event -> go on with what was applied
                                   `train.nonfinite_limit` of them in a row -> NonFiniteError that names the dumps
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable

from ctpo_megatron.batch import Abandoned, TrainBatch, UpdateAbandoned
from ctpo_megatron.errors import CheckpointError, NonFiniteError, StorageError
from ctpo_megatron.loop.dumps import StepDumps, Written
from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.nonfinite_events import DumpLost, StepSkipped
from ctpo_megatron.record.values import Sum, Values

SKIPPED = "skipped_steps"  # optimizer steps that were not made


class Skipping:
    """Decides about the updates of one run. `dumps`: None where none are to be written."""

    def __init__(self, limit: int, dumps: StepDumps | None, emit: Emit) -> None:
        self._limit, self._dumps, self._emit = limit, dumps, emit
        self._in_a_row: list[Written | None] = []  # the dumps of the steps that were skipped since the last that was not

    async def update(self, trainer: Trainer, batches: list[TrainBatch], *, step: int) -> Values:
        """`Trainer.update` of training step `step`, from 1, with `skipped_steps` among the values.

        An abandoned update gives those of the optimizer steps that were applied. Raises NonFiniteError at the limit.
        """
        return await self._tried(trainer.update(batches, version=step - 1), batches, step, supervised=False)

    async def supervise(self, trainer: Trainer, batch: TrainBatch, *, step: int) -> Values:
        """`Trainer.supervise`, in the same way; of an abandoned step there is nothing but `skipped_steps`."""
        return await self._tried(trainer.supervise(batch), [batch], step, supervised=True)

    async def _tried(self, work: Awaitable[Values], batches: list[TrainBatch], step: int, *, supervised: bool) -> Values:
        try:
            values = await work
        except UpdateAbandoned as error:
            await self._skip(error.update, batches, step, supervised)
            return error.update.values | {SKIPPED: Sum(float(len(batches) - error.update.applied))}
        self._in_a_row.clear()
        if self._dumps is not None:
            self._dumps.moved()
        return values | {SKIPPED: Sum(0.0)}

    async def _skip(self, update: Abandoned, batches: list[TrainBatch], step: int, supervised: bool) -> None:
        if self._dumps is not None and update.applied:
            self._dumps.moved()
        written = await self._dumped(update, batches, step, supervised)
        self._in_a_row.append(written)
        dump, size = (None, 0) if written is None else (str(written.path), written.bytes)
        number = update.number(batches) + 1
        many = len(self._in_a_row)
        with contextlib.suppress(StorageError):  # the log may be on the disk that took no dump; the console has it
            self._emit(StepSkipped(step, number, len(batches), update.applied, update.reason, many, self._limit, dump, size))
        if many >= self._limit:
            raise NonFiniteError(self._verdict(update), sequence=update.sequence)

    async def _dumped(self, update: Abandoned, batches: list[TrainBatch], step: int, supervised: bool) -> Written | None:
        if self._dumps is None:
            return None
        try:
            return await self._dumps.write(update, batches, step=step, supervised=supervised)
        except (StorageError, CheckpointError, OSError) as error:
            with contextlib.suppress(StorageError):
                self._emit(DumpLost(step, str(error)))
            return None

    def _verdict(self, update: Abandoned) -> str:
        many = len(self._in_a_row)
        dumps = [str(written.path) for written in self._in_a_row if written is not None and written.path.is_dir()]
        steps = "the training step was" if many == 1 else f"{many} training steps in a row were"
        look = f"Their batches are in {', '.join(dumps)}: look with `ctpo replay {dumps[0]}`." if dumps else "No dump is there."
        return f"{steps} not applied (train.nonfinite_limit={self._limit}). The last: {update.reason} {look}"
