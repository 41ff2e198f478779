"""`ctpo data`: data and model read as a run would read them, and what was found, before a GPU is taken. Starts no run.

What `ctpo train` or `ctpo sft` would refuse is refused here by the same functions, after all that is known was shown.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.data.curriculum import check_curriculum
from ctpo_megatron.data.kind import Kind, kind_of
from ctpo_megatron.data.mixture import new_sampler
from ctpo_megatron.data.survey import find_shared
from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs.data_findings import Findings, ModelFound, demonstrations_found, prompts_found
from ctpo_megatron.jobs.data_text import WIDTH, report
from ctpo_megatron.jobs.inputs import (
    OpenModel,
    PromptFile,
    check_prompt_file,
    demonstration_limit,
    load_demonstrations,
    open_model,
    pool_column,
    read_prompt_file,
    training_files,
)
from ctpo_megatron.record.events import DataRead, Event
from ctpo_megatron.types import Prompt, TrainSample


def data_job(
    config: RunConfig, where: Path, *, use: Kind | None, samples: int, as_json: bool, console: Console | None = None
) -> None:
    """Print what `config`, read from the file `where`, would train on, as text or as JSON.

    `use`: the command that is to read it; None: the one that its columns fit. The first `samples` rows of each file are shown.
    Raises InputError, after printing, for what that command would refuse.
    """
    found = begin(config, where, use or kind_of(config.data.train))
    problem = None
    try:
        look(config, found, samples)
    except InputError as error:
        problem, found.problem = error, str(error)
    if as_json:
        Console(file=sys.stdout).out(json.dumps(dataclasses.asdict(found), indent=2, allow_nan=False), highlight=False)
    else:
        console = console or Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        _print(found, console)
    if problem is not None:
        raise problem


def _print(found: Findings, console: Console) -> None:
    """Print the report; into a file without the blanks that fill lines up."""
    if console.is_terminal:
        for part in report(found):
            console.print(part)
        return
    with console.capture() as captured:
        for part in report(found):
            console.print(part)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def begin(config: RunConfig, where: Path, use: Kind) -> Findings:
    """Returns findings with nothing found yet."""
    per_step, steps = config.train.prompts_per_step, config.train.steps
    if use == "sft":  # both are known when the demonstrations are
        per_step, steps = config.sft.batch_size, config.sft.total_steps(config.sft.batch_size)
    return Findings(config.name, use, str(where), config.data.system_prompt, per_step, steps)


def look(config: RunConfig, found: Findings, samples: int) -> None:
    """Add to `found` all that there is, in the order in which a run reads it. Raises InputError where the run would."""
    model = open_model(config, found.use)
    found.model = ModelFound.of(config, model)
    if found.use == "sft":
        _look_at_demonstrations(config, model, found, samples)
        return
    check_curriculum(config.data.curriculum)
    trained: list[Prompt] = []
    for source, path in training_files(config):
        trained += _look_at_prompts(path, "train", config, model, found, samples, source).prompts
        found.files[-1].share = source_share(config, source)
    new_sampler(trained, config.data, config.seed)
    for benchmark in benchmarks_of(config.data, config.eval, config.rollout):
        held_out = _look_at_prompts(benchmark.file, "eval", config, model, found, samples=0)
        found.files[-1].shared = find_shared(held_out.prompts, trained)


def source_share(config: RunConfig, source: str) -> float | None:
    """Returns the share of prompts that come from a source, empty for data.train; None where a curriculum decides it."""
    data = config.data
    weights = {"": data.weight} | {each.name: each.weight for each in data.mixture}
    return None if data.curriculum and data.mixture else weights[source] / sum(weights.values())


def _look_at_prompts(
    path: str, use: str, config: RunConfig, model: OpenModel, found: Findings, samples: int, source: str = ""
) -> PromptFile:
    events: list[Event] = []
    column = pool_column(config) if use == "train" else None
    file = read_prompt_file(path, config, model.chat, events.append, source=source, difficulty=column)
    found.files.append(prompts_found(file, use, _read(events), config, model.chat, samples))
    found.files[-1].read += () if column is None else (column,)
    check_prompt_file(file, config, model.chat, model.shape)
    return file


def _look_at_demonstrations(config: RunConfig, model: OpenModel, found: Findings, samples: int) -> None:
    trained, asked = 0, dict[tuple[int, ...], str]()
    weights = config.model_copy(update={"data": config.data.model_copy(update={"curriculum": None})})
    for source, path in training_files(config):
        of_file = _look_at_file(path, "sft", config, model, found, samples)
        found.files[-1].share = source_share(weights, source)
        trained += len(of_file)
        for sample in of_file:
            asked.setdefault(_prompt_of(sample), f"{source}:{sample.group}" if source else str(sample.group))
    found.steps, found.rows_per_step = config.sft.total_steps(trained), config.sft.per_step(trained)
    if config.sft.eval is not None:
        held_out = _look_at_file(config.sft.eval, "eval", config, model, found, samples=0)
        of_rows = {sample.group: asked[_prompt_of(sample)] for sample in held_out if _prompt_of(sample) in asked}
        found.files[-1].shared = list(of_rows.items())


def _prompt_of(sample: TrainSample) -> tuple[int, ...]:
    """The tokens before the first that is taught."""
    return tuple(sample.input_ids[: sample.mask.index(True) + 1])


def _look_at_file(path: str, use: str, config: RunConfig, model: OpenModel, found: Findings, samples: int) -> list[TrainSample]:
    events: list[Event] = []
    seen: list[TrainSample] = []
    try:
        return load_demonstrations(path, config, model, events.append, seen.append)
    finally:
        if events:
            limit = demonstration_limit(config)
            found.files.append(demonstrations_found(seen, use, limit, _read(events), config, model.chat, samples))


def _read(events: list[Event]) -> DataRead:
    return next(event for event in events if isinstance(event, DataRead))
