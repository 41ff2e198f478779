"""Supervised training on demonstrations, by itself or before reinforcement learning goes on.

step       the next examples -> one optimizer step
measure    the loss of held-out demonstrations; the best so far is kept as a checkpoint where the run may stop for it
save       when it is due or asked for
end        steps or epochs are done, the loss is low enough, the held-out loss falls no more, or somebody asked to stop
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.data.demonstrations import Demonstrations
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.loop.checkpoints import Checkpoints, checkpoint_directory, steps_in
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.loop.skipping import Skipping
from ctpo_megatron.loop.state import RunState, Supervised
from ctpo_megatron.record import Recorder, progress
from ctpo_megatron.record.events import Emit, StepTrained, discard
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.record.timer import PhaseTimer
from ctpo_megatron.record.values import Values, scalar
from ctpo_megatron.types import TrainSample

SMOOTHING = 0.9  # of the moving average that the stopping rule looks at

End = Literal["steps", "stop_loss", "patience", "asked"]


@dataclass(frozen=True)
class SftResult:
    """Where supervised training ended, and why. Losses are in nats per token."""

    steps: int
    loss: float  # smoothed; not a number where no step was applied
    tokens: float
    end: End
    eval_loss: float | None = None  # lowest held-out loss
    eval_step: int = 0  # after which it was measured
    asked: StopRequest | None = None


@dataclass
class SftLoop:
    """A run of supervised training; `run` drives it from `first_step` to its end.

    `held_out`: demonstrations whose loss is measured. `skipping`: what becomes of a step whose loss or gradient is not finite;
    None: it ends the training. `storage`: what carries the record over faults of the disk. `emit` hears of each step.
    """

    config: RunConfig
    demonstrations: Demonstrations
    trainer: Trainer
    recorder: Recorder
    held_out: Sequence[TrainSample] = ()
    checkpoints: Checkpoints | None = None
    skipping: Skipping | None = None
    storage: Storage = field(default_factory=Storage)
    orders: Orders = field(default_factory=Orders)
    first_step: int = 0
    drawn: int = 0  # examples of the steps that are done
    state: Supervised = field(default_factory=Supervised)
    emit: Emit = discard

    async def run(self) -> SftResult:
        """Train until one of the ends. Exceptions of any part come out as they are.

        With sft.patience the trainer holds the weights of the lowest held-out loss afterwards, unless the run was asked to stop.
        """
        self._step, self._saved = self.first_step, self.first_step
        try:
            end = await self._to_its_end()
            if end != "asked":
                await self._measure_once_more()
            if self.checkpoints is not None:
                await self._settled(self.checkpoints)
                if end != "asked":
                    await self._take_the_best(self.checkpoints)
            await self.storage.clear()
        finally:
            if self.checkpoints is not None:
                await self.checkpoints.abandon()
        state, asked = self.state, self.orders.stop_request if end == "asked" else None
        loss = float("nan") if state.smoothed is None else state.smoothed
        return SftResult(self._step, loss, state.tokens, end, state.best, state.best_step, asked)

    async def _to_its_end(self) -> End:
        total = self.config.sft.total_steps(len(self.demonstrations), done=self._step, drawn=self.drawn)
        with progress("sft", total) as show:
            while self._step < total:
                if self.orders.stop_request is not None:
                    if self.config.checkpoint.on_stop:
                        await self._save()
                    return "asked"
                if self._worn_out():
                    return "patience"
                if self.checkpoints is not None:
                    self.checkpoints.check()
                self._step += 1
                timer, begun = PhaseTimer(), time.monotonic()
                with timer("train"):
                    applied = await self._train()
                best = False
                if self._measurement_due():
                    with timer("measure"):
                        best = await self._measure()
                with timer("checkpoint"):
                    await self._keep(best)
                    await self._save_if_due()
                with timer("storage"):
                    await self.storage.clear()
                self.emit(StepTrained(self._step, time.monotonic() - begun, timer.seconds))
                show(self._step)
                if applied and self._low_enough():
                    return "stop_loss"
        return "patience" if self._worn_out() else "steps"

    async def _train(self) -> bool:
        """Train the next optimizer step; returns whether it was applied."""
        batch, step = self._batch(self._next()), self._step
        if self.skipping is None:
            stats = await self.trainer.supervise(batch)
        else:
            stats = await self.skipping.supervise(self.trainer, batch, step=step)
        epoch = {"sft/epoch": self.drawn / len(self.demonstrations)}
        if "nll" not in stats:
            self.recorder.step(step, {"train/skipped_steps": 1.0, **epoch})
            return False
        loss, before = scalar(stats["nll"]), self.state.smoothed
        smoothed = loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss
        self.state = replace(self.state, smoothed=smoothed, tokens=self.state.tokens + scalar(stats["tokens"]))
        norm = {"train/grad_norm": scalar(stats["grad_norm"])}
        self.recorder.step(step, {"sft/loss": loss, "sft/loss_smoothed": smoothed, **norm, **epoch, **_rate(stats)})
        return True

    def _next(self) -> list[TrainSample]:
        sft, examples = self.config.sft, len(self.demonstrations)
        count = sft.per_step(examples)
        if sft.epochs is not None:
            count = min(count, sft.epochs * examples - self.drawn)
        self.drawn += count
        return self.demonstrations.next(count)

    def _batch(self, samples: Sequence[TrainSample]) -> TrainBatch:
        parallel, train = self.config.parallel, self.config.train
        most, multiple = train.max_tokens_per_micro_batch, train.token_multiple
        return build_train_batch(samples, aggregation=TokenMean(), parallel=parallel, max_tokens=most, token_multiple=multiple)

    # ---- held-out demonstrations

    def _measurement_due(self) -> bool:
        every = self.config.sft.eval_every
        return bool(self.held_out) and every > 0 and self._step % every == 0

    async def _measure_once_more(self) -> None:
        if self.held_out and self._step > self.first_step and not self._measurement_due():
            await self._keep(await self._measure())

    async def _measure(self) -> bool:
        """Measure the held-out loss; returns whether it is the lowest."""
        at_once, total, tokens = self.config.sft.batch_size, 0.0, 0.0
        for first in range(0, len(self.held_out), at_once):
            stats = await self.trainer.assess(self._batch(self.held_out[first : first + at_once]))
            total += scalar(stats["nll"]) * scalar(stats["tokens"])
            tokens += scalar(stats["tokens"])
        loss, best = total / tokens, self.state.best
        self.recorder.step(self._step, {"sft/eval_loss": loss})
        if not (math.isfinite(loss) and (best is None or loss < best)):
            self.state = replace(self.state, waited=self.state.waited + 1)
            return False
        self.state = replace(self.state, best=loss, best_step=self._step, waited=0)
        return True

    async def _keep(self, best: bool) -> None:
        """Keep these weights where they are the best and the run may come back to them."""
        if best and self.config.sft.patience is not None:
            await self._save()

    def _worn_out(self) -> bool:
        patience = self.config.sft.patience
        return patience is not None and self.state.waited >= patience

    def _low_enough(self) -> bool:
        stop, smoothed = self.config.sft.stop_loss, self.state.smoothed
        return stop is not None and smoothed is not None and smoothed < stop

    async def _take_the_best(self, checkpoints: Checkpoints) -> None:
        """Let the trainer hold the weights of the lowest held-out loss, where there is a checkpoint of them."""
        best = self.state.best_step
        if self.config.sft.patience is not None and best != self._step and best in steps_in(checkpoints.root):
            await self.trainer.load(checkpoint_directory(checkpoints.root, best))

    # ---- checkpoints

    def needed(self) -> tuple[int, ...]:
        """The steps whose checkpoints are to stay, however old they are."""
        return () if self.config.sft.patience is None or self.state.best is None else (self.state.best_step,)

    async def _save_if_due(self) -> None:
        every = self.config.checkpoint.every
        behind = self.checkpoints is not None and self.checkpoints.behind
        if self.orders.take_save() or behind or (every > 0 and self._step % every == 0):
            await self._save()

    async def _settled(self, checkpoints: Checkpoints) -> None:
        """Wait until the last save is on the disk, also where that did not take it at first."""
        await checkpoints.settle()
        if checkpoints.behind:
            self._saved = self.first_step
            await self._save()
            await checkpoints.settle()

    async def _save(self) -> None:
        if self.checkpoints is not None and self._saved < self._step:
            cursor = self.demonstrations.state()
            await self.checkpoints.save(RunState(self._step, self.drawn, cursor, {}, supervised=self.state))
            self._saved = self._step


def _rate(stats: Values) -> dict[str, float]:
    return {"train/lr": scalar(stats["lr"])} if "lr" in stats else {}
