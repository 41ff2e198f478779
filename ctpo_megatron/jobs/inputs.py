"""Everything the user gave, checked before a process is started."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.data.prompts import check_prompt_lengths, read_prompts
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import ConfigError, DataError, RenderError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt


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


def load_prompts(path: str, config: RunConfig, chat: ChatTokenizer) -> list[Prompt]:
    """The prompts of a file, none of them too long, and all of them such that the chat template can go on from them."""
    prompts = read_prompts(path, system_prompt=config.data.system_prompt)
    check_rendering(prompts, chat, path, turns=config.rollout.tool is not None)
    check_prompt_lengths(prompts, chat, max_tokens=config.data.max_prompt_tokens, path=path)
    return prompts


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


def prepare_run_dir(config: RunConfig) -> Path:
    """Make RUN_DIR with the resolved configuration in it."""
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={config.run_dir} is a file; give a directory")
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    return run_dir.resolve()
