"""The copies in memory that a run makes, as its configuration asks for them."""

from __future__ import annotations

from pathlib import Path

import yaml

from ctpo_megatron.cluster.keepers.group import Keepers
from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.loop.memory import MemoryCopies
from ctpo_megatron.record.events import Emit


def make_memory(runtime: Runtime, config: RunConfig, run_dir: Path, emit: Emit) -> MemoryCopies:
    """Returns them for the trainer of `runtime`, whichever that is at the time."""
    memory = config.checkpoint.memory
    keepers = Keepers(lambda: runtime.trainer, run_dir / "logs", memory.timeout_s)
    return MemoryCopies(keepers, memory.every, yaml.safe_load(dump_config(config)), emit)
