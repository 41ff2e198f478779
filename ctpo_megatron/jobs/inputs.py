"""Everything the user gave, checked before a process is started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.environments import CodeEnvironment
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.data.curriculum import check_curriculum
from ctpo_megatron.data.packing import longest_sample
from ctpo_megatron.data.prompts import prompt_lengths, read_prompts, refuse_long
from ctpo_megatron.data.sft import LengthLimit, read_demonstrations
from ctpo_megatron.errors import ConfigError, DataError, RenderError, StorageError, out_of_space, storage_words
from ctpo_megatron.jobs.agreement import (
    check_demonstrations,
    check_own_tokens,
    check_prompt_tokens,
    check_rollouts,
    check_training,
)
from ctpo_megatron.jobs.layouts import check_layouts
from ctpo_megatron.jobs.teachers import check_teachers
from ctpo_megatron.jobs.worlds import worlds_of
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.rewards.opening import check_answers, check_reward
from ctpo_megatron.types import Prompt, TrainSample

Use = Literal["train", "eval", "sft"]  # the commands that read data


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that a command can use, as far as that is known without its weights: its shape, and its way with text."""

    shape: ModelShape
    chat: ChatTokenizer


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file, all of which the chat template can write, and how many tokens each of them has."""

    path: str
    prompts: list[Prompt]
    lengths: list[int]


def open_model(config: RunConfig, use: Use) -> OpenModel:
    """The model of a run, compared with the configuration as far as the command needs. Raises InputError."""
    shape, directory = read_model(config), Path(config.model.path)
    if use == "train":
        check_training(config, shape, directory)
        check_teachers(config, shape)
    elif use == "eval":
        check_rollouts(config, shape, directory)
    chat = ChatTokenizer(config.model.path, config.model)
    if use != "sft":
        check_reward(config.rollout.reward)
        worlds_of(config.rollout.environment)
        check_own_tokens(chat, shape)
    return OpenModel(shape, chat)


def read_model(config: RunConfig) -> ModelShape:
    """The shape of the model, which divides over the trainer's ranks in all its layouts. Raises ModelError and ConfigError.

    Read once: everything else in the run is given the shape.
    """
    shape = read_hf_config(config.model.path)
    check_layouts(shape, config)
    return shape


def load_prompts(
    path: str, config: RunConfig, chat: ChatTokenizer, emit: Emit = discard, shape: ModelShape | None = None
) -> list[Prompt]:
    """The prompts of a file, all of which a run can use; `emit` hears what was read and what was not used.

    `shape` is that of the model, whose embedding has to know their tokens; None: that is not looked at.
    """
    file = read_prompt_file(path, config, chat, emit)
    check_prompt_file(file, config, chat, shape)
    return file.prompts


def load_training_prompts(config: RunConfig, chat: ChatTokenizer, emit: Emit, shape: ModelShape | None) -> list[Prompt]:
    """The prompts of data.train and of all sources of the mixture, all of which a run can use. Raises DataError, ConfigError."""
    check_curriculum(config.data.curriculum)
    found = list[Prompt]()
    for source, path in training_files(config):
        file = read_prompt_file(path, config, chat, emit, source=source, difficulty=pool_column(config))
        check_prompt_file(file, config, chat, shape)
        found += file.prompts
    return found


def training_files(config: RunConfig) -> list[tuple[str, str]]:
    """The files of prompts to train on, each after what its prompts are said to be from: nothing for data.train."""
    return [("", config.data.train), *((each.name, each.path) for each in config.data.mixture)]


def pool_column(config: RunConfig) -> str | None:
    """The column that prompts to train on have besides; None: there is none."""
    return None if config.data.pools is None else config.data.pools.column


def more_turns(rollout: RolloutConfig) -> bool:
    """Whether something answers the model's turns."""
    return rollout.code_tool is not None or not isinstance(rollout.environment, CodeEnvironment)


def read_prompt_file(
    path: str, config: RunConfig, chat: ChatTokenizer, emit: Emit = discard, *, source: str = "", difficulty: str | None = None
) -> PromptFile:
    """The prompts of a file, of any length, all of them such that the chat template can go on from them. Raises DataError.

    `source`, `difficulty`: see `data.prompts.read_prompts`.
    """
    prompts = read_prompts(path, system_prompt=config.data.system_prompt, emit=emit, source=source, difficulty=difficulty)
    check_rendering(prompts, chat, path, turns=more_turns(config.rollout))
    return PromptFile(path, prompts, prompt_lengths(prompts, chat, path))


def check_prompt_file(file: PromptFile, config: RunConfig, chat: ChatTokenizer, shape: ModelShape | None) -> None:
    """Raise DataError, naming the rows, where prompts are too long, or have tokens that the model does not know or known
    answers that the reward cannot use."""
    check_answers(config.rollout.reward, file.prompts, file.path)
    refuse_long(file.prompts, file.lengths, max_tokens=config.data.max_prompt_tokens, path=file.path)
    if shape is not None:
        check_prompt_tokens(file.prompts, file.path, chat, shape, Path(config.model.path))


def check_rendering(prompts: list[Prompt], chat: ChatTokenizer, path: str, *, turns: bool) -> None:
    """Raise DataError, naming the row, for a prompt of `path` that the chat template does not write as rollouts would have it.

    Compared are the first of every form: prompts of one form have the same roles and the same keys. `turns`: with tool turns.
    """
    firsts: dict[tuple[tuple[str, ...], ...], Prompt] = {}
    for prompt in prompts:
        form = tuple((each["role"], *(key for key, value in each.items() if value)) for each in prompt.messages)
        firsts.setdefault(form, prompt)
    for prompt in firsts.values():
        try:
            chat.check_prompt(prompt.messages)
            if turns:
                chat.check_turns(prompt.messages)
        except RenderError as error:
            raise DataError(f"{path} row {prompt.index}: {error}") from error


def load_demonstrations(
    path: str, config: RunConfig, model: OpenModel, emit: Emit = discard, hear: Callable[[TrainSample], None] | None = None
) -> list[TrainSample]:
    """The demonstrations of a file, all of which a run can use. `emit` hears what was read, `hear` of each, however long."""
    samples = read_demonstrations(
        path,
        model.chat,
        system_prompt=config.data.system_prompt,
        limit=demonstration_limit(config),
        turns=config.sft.turns,
        emit=emit,
        hear=hear,
    )
    check_demonstrations(samples, path, model.chat, model.shape)
    return samples


def load_all_demonstrations(config: RunConfig, model: OpenModel, emit: Emit = discard) -> dict[str, list[TrainSample]]:
    """The demonstrations of data.train, under an empty name, and of the mixture's sources under theirs."""
    return {name: load_demonstrations(path, config, model, emit) for name, path in training_files(config)}


def demonstration_limit(config: RunConfig) -> LengthLimit:
    """The longest demonstration that a micro-batch holds."""
    per_rank, cp = config.train.max_tokens_per_micro_batch, config.parallel.cp
    words = f"train.max_tokens_per_micro_batch = {per_rank}" + (f" on each of parallel.cp = {cp} ranks" if cp > 1 else "")
    return LengthLimit(longest_sample(config.parallel, per_rank), words)


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
