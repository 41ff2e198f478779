"""Everything the user gave, checked before a process is started."""

from __future__ import annotations

import os
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.data.packing import longest_sample
from ctpo_megatron.data.prompts import check_prompt_lengths, read_prompts
from ctpo_megatron.data.sft import LengthLimit, read_demonstrations
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import ConfigError, StorageError, out_of_space, storage_words
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt, TrainSample


def read_model(config: RunConfig) -> ModelShape:
    """The shape of the model, which divides over the trainer's and the servers' ranks. Raises ModelError and ConfigError.

    Read once: everything else in the run is given the shape.
    """
    shape = read_hf_config(config.model.path)
    check_layout(shape, config.parallel)
    tp = config.rollout.engine.tp
    if shape.num_heads % tp:
        raise ConfigError(f"rollout.engine.tp={tp} does not divide the {shape.num_heads} attention heads of {config.model.path}")
    return shape


def check_servers(config: RunConfig, shape: ModelShape) -> None:
    """Raises ConfigError where it cannot be proven tensor by tensor what the servers hold.

    What only servers on CPUs need is checked where `cluster.device` says cpu.
    """
    EngineLayout(shape, config.rollout.engine.tp, cpu=config.cluster.device == "cpu")


def load_prompts(path: str, config: RunConfig, chat: ChatTokenizer, emit: Emit = discard) -> list[Prompt]:
    """The prompts of a file, none of them too long; `emit` hears what was read and what was not used."""
    prompts = read_prompts(path, system_prompt=config.data.system_prompt, emit=emit)
    check_prompt_lengths(prompts, chat, max_tokens=config.data.max_prompt_tokens, path=path)
    return prompts


def load_demonstrations(config: RunConfig, chat: ChatTokenizer, emit: Emit = discard) -> list[TrainSample]:
    """The demonstrations of data.train, none of them too long for a micro-batch; `emit` hears what was read."""
    per_rank, cp = config.train.max_tokens_per_micro_batch, config.parallel.cp
    words = f"train.max_tokens_per_micro_batch = {per_rank}" + (f" on each of parallel.cp = {cp} ranks" if cp > 1 else "")
    limit = LengthLimit(longest_sample(config.parallel, per_rank), words)
    return read_demonstrations(config.data.train, chat, system_prompt=config.data.system_prompt, limit=limit, emit=emit)


def check_output(key: str, path: Path) -> None:
    """Raises ConfigError where a directory cannot be written at `path`, the value of `key`: at the end it would be too late."""
    place = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not place.is_dir():
        raise ConfigError(f"{key}={path}: {place} is a file; give a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={path}: no permission to write in {place}")


def prepare_run_dir(config: RunConfig) -> Path:
    """Make RUN_DIR with the resolved configuration in it."""
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={config.run_dir} is a file; give a directory")
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config))
    except OSError as error:
        if out_of_space(error):
            raise StorageError(storage_words(error, run_dir)) from error
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {storage_words(error)}") from error
    return run_dir.resolve()
