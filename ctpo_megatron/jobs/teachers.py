"""Teachers of a run: compared with the model before anything starts, tried, and open while the run lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.distillation import AskedTeacher, BaseTeacher, CopiedTeacher, ServedTeacher
from ctpo_megatron.engine.teachers import AskedTeachers, NextUrl, TeacherClient, in_turn, read_key, serving
from ctpo_megatron.errors import ConfigError, EngineError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.context import READ
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.vocabulary import check_same_tokens, largest_id

if TYPE_CHECKING:  # it imports Ray, and commands that only look at a configuration come here
    from ctpo_megatron.cluster.runtime import Runtime

TRIES_AT_START = 3  # of a server that is to be there already


def check_teachers(config: RunConfig, shape: ModelShape) -> None:
    """Compare teachers, by the files that they are described by, with the model and with what they will be asked.

    Raises InputError that names the teacher: another vocabulary, a shorter context, another shape where it is copied.
    """
    distillation = config.algorithm.distillation
    for teacher in [] if distillation is None else distillation.teachers:
        check_same_tokens(Path(config.model.path), Path(teacher.path), f"teacher {teacher.name!r}")
        if isinstance(teacher, CopiedTeacher):
            _check_shape(teacher, config, shape)
        else:
            _check_described(teacher, config)
        if isinstance(teacher, ServedTeacher):
            read_key(teacher)


def _check_shape(teacher: CopiedTeacher, config: RunConfig, shape: ModelShape) -> None:
    """A copied teacher takes the model's place, so it has to be of its shape; its context may be another."""
    its = read_hf_config(teacher.path)
    if replace(its, dtype=shape.dtype, max_positions=shape.max_positions) != shape:
        raise ConfigError(
            f"{_setting(teacher)}: {teacher.path} has another shape than {config.model.path}, but type: copied puts its weights "
            "in the model's place; serve it with SGLang and use type: served"
        )
    _check_length(teacher, its.max_positions, _longest(config))


def _check_described(teacher: AskedTeacher, config: RunConfig) -> None:
    """Compare what config.json says of a teacher of any family."""
    rows, context = _described(teacher, "vocab_size"), _described(teacher, "max_position_embeddings")
    needed = largest_id(Path(teacher.path)) + 1
    if rows is not None and rows < needed:
        raise ConfigError(f"{_setting(teacher)}: its config.json has vocab_size={rows}, but its tokenizer needs {needed}")
    if context is not None:
        _check_length(teacher, context - READ, _longest(config))


def _described(teacher: AskedTeacher, key: str) -> int | None:
    """A number of a teacher's config.json; None where it is not there."""
    content = read_json(Path(teacher.path) / "config.json")
    described: dict[str, Any] = content.get("text_config") or content  # models of several modes
    value = described.get(key)
    return value if isinstance(value, int) else None


def _check_length(teacher: BaseTeacher, limit: int, longest: int) -> None:
    if longest > limit:
        raise ConfigError(
            f"{_setting(teacher)} reads at most {limit} tokens, but data.max_prompt_tokens + rollout.max_response_tokens = "
            f"{longest}; shorten these, or take a teacher with a longer context"
        )


def _longest(config: RunConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def _setting(teacher: BaseTeacher) -> str:
    return f"algorithm.distillation: teacher {teacher.name!r}"


async def ask_teachers(config: RunConfig) -> None:
    """Try every server of teachers that run already: `_try`, before anything is started."""
    distillation = config.algorithm.distillation
    for teacher in [] if distillation is None else distillation.asked.values():
        if isinstance(teacher, ServedTeacher):
            for url in teacher.urls:
                await _try(teacher, in_turn([url]), read_key(teacher), config)


async def _try(teacher: AskedTeacher, next_url: NextUrl, key: str, config: RunConfig) -> None:
    """Let a teacher's server read the longest sequence that the run may have, of its tokenizer's last token.

    Raises ConfigError for one that is not there, refuses the key, is no SGLang, has fewer tokens or a shorter context.
    """
    tokens = [largest_id(Path(teacher.path))] * _longest(config)
    impatient = teacher.model_copy(update={"retries": TRIES_AT_START - 1})
    try:
        async with TeacherClient(impatient, next_url, key) as client:
            await client.logp(tokens, len(tokens) - 1)
    except EngineError as error:
        raise ConfigError(
            f"{_setting(teacher)} was tried with {len(tokens)} tokens, the longest sequence of this run: {error}"
        ) from error


@asynccontextmanager
async def open_teachers(runtime: Runtime) -> AsyncIterator[AskedTeachers | None]:
    """The teachers on servers, connected, those that the run has started tried first; None where there are none."""
    config, distillation = runtime.config, runtime.config.algorithm.distillation
    if distillation is None or not distillation.asked:
        yield None
        return
    clients = {}
    for place, teacher in distillation.asked.items():
        rows = _described(teacher, "vocab_size")
        if isinstance(teacher, ServedTeacher):
            clients[place] = TeacherClient(teacher, in_turn(teacher.urls), read_key(teacher), rows)
        else:
            next_url = serving(runtime.teachers[place])
            await _try(teacher, next_url, runtime.api_key, config)
            clients[place] = TeacherClient(teacher, next_url, runtime.api_key, rows)
    async with AskedTeachers(clients, distillation.teacher_of) as teachers:
        yield teachers
