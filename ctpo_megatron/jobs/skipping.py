"""What a run does about steps whose loss or gradient is not finite, as its configuration asks for it."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.loop.checkpoints import Checkpoints
from ctpo_megatron.loop.dumps import StepDumps
from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.loop.skipping import Skipping
from ctpo_megatron.record.events import Emit


def make_skipping(
    trainer: Trainer, config: RunConfig, run_dir: Path, emit: Emit, checkpoints: Checkpoints | None = None
) -> Skipping:
    """Returns it with its dumps in RUN_DIR/dumps, or without, where `train.nonfinite_dumps` is 0."""
    wanted = config.train.nonfinite_dumps > 0
    dumps = StepDumps(trainer, run_dir / "dumps", config, checkpoints) if wanted else None
    return Skipping(config.train.nonfinite_limit, dumps, emit)
