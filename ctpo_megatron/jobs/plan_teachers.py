"""What a plan knows of the teachers whose servers a run starts: their shapes, from their own config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.distillation import StartedTeacher, engine_section
from ctpo_megatron.errors import InputError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.planning.servers import PlannedTeacher

FP8 = "fp8"  # the quant_method of DeepSeek-V3's blocks


def planned_teachers(config: RunConfig) -> list[PlannedTeacher]:
    """Returns the teachers of `config` whose servers the run starts, in their order.

    SGLang serves models that this package cannot train, and a plan may be made where no teacher is: one whose config.json is
    not there or not known has no shape, and the reason.
    """
    distillation = config.algorithm.distillation
    started = {} if distillation is None else distillation.started
    return [_planned(place, teacher) for place, teacher in started.items()]


def _planned(place: int, teacher: StartedTeacher) -> PlannedTeacher:
    engine, source = teacher.engine.as_engine(), Path(teacher.path) / "config.json"
    section = engine_section(place)
    try:
        content = dict(read_json(source))
        method = content.get("quantization_config")
        in_blocks = isinstance(method, Mapping) and method.get("quant_method") == FP8
        if in_blocks:
            del content["quantization_config"]
        shape = parse_config(content, str(source))
    except (InputError, OSError) as error:
        return PlannedTeacher(teacher.name, section, engine, teacher.concurrency, None, unplanned=str(error))
    return PlannedTeacher(teacher.name, section, engine, teacher.concurrency, shape, quantised=in_blocks)
