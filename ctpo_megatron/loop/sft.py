"""Supervised training on demonstrations: teaches a format before reinforcement learning goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.loop.skipping import Skipping
from ctpo_megatron.record import Recorder, progress
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.record.values import scalar
from ctpo_megatron.types import TrainSample

SMOOTHING = 0.9  # of the moving average that the stopping rule looks at


@dataclass(frozen=True)
class SftResult:
    """Where supervised training ended."""

    steps: int
    loss: float  # smoothed, nats per token
    tokens: float


async def run_sft(
    config: RunConfig,
    samples: list[TrainSample],
    trainer: Trainer,
    recorder: Recorder,
    skipping: Skipping | None = None,
    storage: Storage | None = None,
) -> SftResult:
    """Train for sft.steps optimizer steps, or until the smoothed loss falls below sft.stop_loss.

    `skipping`: what becomes of a step whose loss or gradient is not finite; None: it ends the training. `storage`: what
    carries the record over faults of the disk.
    """
    sft = config.sft
    rng = np.random.default_rng(config.seed)
    smoothed, tokens, step = float("nan"), 0.0, 0
    with progress("sft", sft.steps) as show:
        for step in range(1, sft.steps + 1):
            chosen = rng.choice(len(samples), size=min(sft.batch_size, len(samples)), replace=False)
            batch = build_train_batch(
                [samples[i] for i in chosen],
                aggregation=TokenMean(),
                parallel=config.parallel,
                max_tokens=config.train.max_tokens_per_micro_batch,
            )
            supervised = trainer.supervise(batch) if skipping is None else skipping.supervise(trainer, batch, step=step)
            stats = await supervised
            if "nll" not in stats:
                recorder.step(step, {"train/skipped_steps": 1.0})
                continue
            loss = scalar(stats["nll"])
            smoothed = loss if math.isnan(smoothed) else SMOOTHING * smoothed + (1 - SMOOTHING) * loss
            tokens += scalar(stats["tokens"])
            recorder.step(step, {"sft/loss": loss, "sft/loss_smoothed": smoothed, "train/grad_norm": scalar(stats["grad_norm"])})
            if storage is not None:
                await storage.clear()
            show(step)
            if sft.stop_loss is not None and smoothed < sft.stop_loss:
                break
    return SftResult(step, smoothed, tokens)
