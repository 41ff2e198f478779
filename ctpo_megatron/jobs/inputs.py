"""Everything the user gave, checked before a process is started."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.data.packing import longest_sample
from ctpo_megatron.data.prompts import check_prompt_lengths, read_prompts
from ctpo_megatron.data.sft import LengthLimit, read_demonstrations
from ctpo_megatron.errors import ConfigError, DataError, RenderError, StorageError, out_of_space, storage_words
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt, TrainSample


def read_model(config: RunConfig) -> ModelShape:
    """The shape of the model, which divides over the trainer's ranks. Raises ModelError and ConfigError.

    Read once: everything else in the run is given the shape.
    """
    shape = read_hf_config(config.model.path)
    check_layout(shape, config.parallel)
    return shape


def load_prompts(path: str, config: RunConfig, chat: ChatTokenizer, emit: Emit = discard) -> list[Prompt]:
    """The prompts of a file, none of them too long, and all of them such that the chat template can go on from them.

    `emit` hears what was read and what was not used.
    """
    prompts = read_prompts(path, system_prompt=config.data.system_prompt, emit=emit)
    check_rendering(prompts, chat, path, turns=config.rollout.tool is not None)
    check_prompt_lengths(prompts, chat, max_tokens=config.data.max_prompt_tokens, path=path)
    return prompts


def check_rendering(prompts: list[Prompt], chat: ChatTokenizer, path: str, *, turns: bool) -> None:
    """Raise DataError, naming the row, for a prompt of `path` that the chat template does not write as rollouts would have it.

    Compared are the first of every form: prompts of one form have the same roles and the same keys. `turns`: with tool turns.
    """
    firsts: dict[tuple[tuple[str, ...], ...], Prompt] = {}
    for prompt in prompts:
        firsts.setdefault(tuple((message["role"], *message) for message in prompt.messages), prompt)
    for prompt in firsts.values():
        try:
            chat.check_prompt(prompt.messages)
            if turns:
                chat.check_turns(prompt.messages)
        except RenderError as error:
            raise DataError(f"{path} row {prompt.index}: {error}") from error


def load_demonstrations(config: RunConfig, chat: ChatTokenizer, emit: Emit = discard) -> list[TrainSample]:
    """The demonstrations of data.train, none of them too long for a micro-batch; `emit` hears what was read."""
    per_rank, cp = config.train.max_tokens_per_micro_batch, config.parallel.cp
    words = f"train.max_tokens_per_micro_batch = {per_rank}" + (f" on each of parallel.cp = {cp} ranks" if cp > 1 else "")
    limit = LengthLimit(longest_sample(config.parallel, per_rank), words)
    return read_demonstrations(config.data.train, chat, system_prompt=config.data.system_prompt, limit=limit, emit=emit)


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
