"""`ctpo convert`: a model's weights between the Hugging Face format and a checkpoint, every tensor of the output verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ctpo_megatron.checkpoints.directories import TEMPORARY_SUFFIX, complete_directory
from ctpo_megatron.config.base import Section
from ctpo_megatron.config.explain import explain
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.sources import COMMAND_LINE, read_overrides
from ctpo_megatron.errors import InputError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.rules import check_layout


class _Conversion(Section):
    parallel: ParallelConfig = ParallelConfig()


def convert_to_megatron(model: Path, out: Path, overrides: list[str]) -> None:
    """A checkpoint of weights only, with the model's configuration and tokenizer in it."""
    from ctpo_megatron.mcore.checkpoint.convert import weights_to_megatron

    parallel = _parallel(overrides)
    check_layout(read_hf_config(model), parallel)
    _convert(weights_to_megatron, model, out, parallel)


def convert_to_hf(checkpoint: Path, out: Path, overrides: list[str]) -> None:
    """A Hugging Face directory of the weights in a checkpoint, a run's or one of weights only."""
    from ctpo_megatron.mcore.checkpoint.convert import checkpoint_shape, weights_to_hf

    parallel = _parallel(overrides)
    check_layout(checkpoint_shape(checkpoint), parallel)
    _convert(weights_to_hf, checkpoint, out, parallel)


def convert_to_peft(checkpoint: Path, out: Path, overrides: list[str]) -> None:
    """A directory in peft's format of the adapters in a checkpoint."""
    from ctpo_megatron.mcore.checkpoint.convert import adapters_to_peft, checkpoint_shape

    parallel = _parallel(overrides)
    check_layout(checkpoint_shape(checkpoint), parallel)
    _convert(adapters_to_peft, checkpoint, out, parallel)


def _convert(function: Callable, source: Path, out: Path, parallel: ParallelConfig) -> None:
    """Run `function` on all ranks; `out` gets its name when all of it is verified, and nothing is left otherwise."""
    from ctpo_megatron.cluster.local_ranks import run_local_ranks

    if out.exists():
        raise InputError(f"{out} exists already; choose another directory, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + ".unverified")
    try:
        verified = run_local_ranks(parallel.world_size, function, str(source), str(work), parallel)[0]
        complete_directory(work, out)
    finally:
        for left in (work, work.with_name(work.name + TEMPORARY_SUFFIX)):
            shutil.rmtree(left, ignore_errors=True)
    print(f"{out}: {verified.tensors} tensors, {verified.bytes} bytes verified")


def _parallel(overrides: list[str]) -> ParallelConfig:
    source = read_overrides(overrides)
    try:
        return _Conversion.model_validate(source.values).parallel
    except ValidationError as error:
        raise InputError(explain(error, [source], COMMAND_LINE)) from error
