"""Teachers of a run: compared with the model before anything starts, tried, and open while the run lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.distillation import CopiedTeacher, ServedTeacher, Teacher
from ctpo_megatron.engine.teachers import ServedTeachers, TeacherClient, read_key
from ctpo_megatron.errors import ConfigError, EngineRefused, TeacherFailed
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.context import READ
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.vocabulary import check_same_tokens, largest_id

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
            read_key(teacher)
            _check_described(teacher, _longest(config))


def _check_shape(teacher: CopiedTeacher, config: RunConfig, shape: ModelShape) -> None:
    """A copied teacher takes the model's place, so it has to be of its shape; its context may be another."""
    its = read_hf_config(teacher.path)
    if replace(its, dtype=shape.dtype, max_positions=shape.max_positions) != shape:
        raise ConfigError(
            f"{_setting(teacher)}: {teacher.path} has another shape than {config.model.path}, but type: copied puts its weights "
            "in the model's place; serve it with SGLang and use type: served"
        )
    _check_length(teacher, its.max_positions, _longest(config))


def _check_described(teacher: ServedTeacher, longest: int) -> None:
    """What config.json says of a teacher of any family."""
    file = Path(teacher.path) / "config.json"
    content = read_json(file)
    described: dict[str, Any] = content.get("text_config") or content  # models of several modes
    rows, context = described.get("vocab_size"), described.get("max_position_embeddings")
    needed = largest_id(Path(teacher.path)) + 1
    if isinstance(rows, int) and rows < needed:
        raise ConfigError(f"{_setting(teacher)}: {file} has vocab_size={rows}, but its tokenizer needs {needed}")
    if isinstance(context, int):
        _check_length(teacher, context - READ, longest)


def _check_length(teacher: Teacher, limit: int, longest: int) -> None:
    if longest > limit:
        raise ConfigError(
            f"{_setting(teacher)} reads at most {limit} tokens, but data.max_prompt_tokens + rollout.max_response_tokens = "
            f"{longest}; shorten these, or take a teacher with a longer context"
        )


def _longest(config: RunConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def _setting(teacher: Teacher) -> str:
    return f"algorithm.distillation: teacher {teacher.name!r}"


async def ask_teachers(config: RunConfig) -> None:
    """Let every server of every teacher read the longest sequence that the run may have, of its tokenizer's last token.

    Raises ConfigError for one that is not there, refuses the key, is no SGLang, has fewer tokens or a shorter context.
    """
    distillation = config.algorithm.distillation
    for teacher in [] if distillation is None else distillation.served.values():
        tokens = [largest_id(Path(teacher.path))] * _longest(config)
        for url in teacher.urls:
            once = teacher.model_copy(update={"urls": (url,), "retries": TRIES_AT_START - 1})
            try:
                async with TeacherClient(once, read_key(teacher)) as client:
                    await client.logp(tokens, len(tokens) - 1)
            except (TeacherFailed, EngineRefused) as error:
                raise ConfigError(
                    f"{_setting(teacher)} was tried with {len(tokens)} tokens, the longest sequence of this run: {error}"
                ) from error


@asynccontextmanager
async def open_teachers(config: RunConfig) -> AsyncIterator[ServedTeachers | None]:
    """The teachers on servers, connected; None where there are none."""
    distillation = config.algorithm.distillation
    if distillation is None or not distillation.served:
        yield None
        return
    async with ServedTeachers(distillation.served, distillation.teacher_of) as teachers:
        yield teachers
