"""Where a run begins: at its first step, or behind a checkpoint. All that needs no process is checked before one is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ctpo_megatron.checkpoints.files import MODEL
from ctpo_megatron.checkpoints.hashes import file_hash
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.data.mixture import Sampler, new_sampler, parts_in, restored_sampler
from ctpo_megatron.data.order import last_seed
from ctpo_megatron.errors import CheckpointError, DataError, InputError
from ctpo_megatron.loop.admission import Admission, Admitted, Position
from ctpo_megatron.loop.checkpoints import Resumable, newest, newest_or_none, refuse_earlier
from ctpo_megatron.loop.differences import (
    ABSENT,
    PROMPT_KEYS,
    Difference,
    Effect,
    dtype_that_differs,
    settings_that_differ,
    shapes_that_differ,
)
from ctpo_megatron.loop.state import OpenGroup
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.events import Emit, SettingsUnknown
from ctpo_megatron.types import GroupId, Prompt

Resume = Literal["no", "newest", "auto"]
"""How a run begins: anew, from the newest checkpoint, which there has to be, or from whatever an earlier process left."""

MODEL_CONFIG = "config.json"  # of the model; what it describes is compared, as its number format may differ


@dataclass(frozen=True)
class Start:
    """What is done when a run begins, and what follows for the whole of it."""

    admission: Admission
    position: Position  # where its prompts and groups go on
    total_steps: int  # optimizer steps of the whole run: those that were made, and those to come
    step: int = 0
    samples: int | None = 0
    accuracies: dict[int, float] = field(default_factory=dict)
    gone: tuple[int, ...] = ()  # groups that were open, and whose prompts are not among the present ones
    owed: tuple[int, ...] = ()  # evaluations of earlier steps that were not done
    alarms: dict[str, Any] | None = None  # what they remembered; None: they read all rows of the run


def checkpoint_to_resume(config: RunConfig, resume: Resume, emit: Emit) -> Resumable | None:
    """Returns the newest checkpoint, None for a run that begins at its first step.

    Raises InputError where the run cannot be what the user asked for.
    """
    run_dir = Path(config.run_dir)
    if resume == "no":
        refuse_earlier(run_dir)
        return None
    try:
        root = run_dir / "checkpoints"
        found = newest_or_none(root, emit) if resume == "auto" else newest(root, config.train.steps, emit)
        if found is not None and found.state.supervised is not None:
            raise InputError(f"--resume: {found.checkpoint} is of `ctpo sft`; go on with that command, or choose another run_dir")
        return found
    except CheckpointError as error:  # nothing was started, and another release, or a look at the directory, mends it
        raise InputError(f"--resume: {error}") from error


def is_done(config: RunConfig) -> bool:
    """Whether the run directory holds the summary of a run that has come to its end, with all of the steps that are wanted."""
    summary = Path(config.run_dir) / "summary.json"
    return summary.is_file() and read_json(summary).get("steps", 0) >= config.train.steps


def differences(
    found: Resumable, config: RunConfig, shape: ModelShape, emit: Emit, *, supervised: bool = False
) -> list[Difference]:
    """Returns what differs between a checkpoint and the present settings, but for the prompts, which `start_of` compares.

    `supervised`: of `ctpo sft`. Where a resume cannot change some of it, all is told and InputError raised, which names that.
    """
    if found.in_memory:
        return []  # it is of this very process
    now = yaml.safe_load(dump_config(config))
    known = found.config
    changed = [] if known is None else settings_that_differ(known, now, supervised=supervised)
    if known is None and (seed := last_seed(found.state.cursor)) != config.seed:
        changed += settings_that_differ({"seed": seed}, {"seed": config.seed})
    changed += dtype_that_differs(found.manifest["dtype"], None if known is None else known["model"]["dtype"], config)
    changed += _of_the_model(found, config, shape)
    refused = [each for each in changed if each.effect == "refused"]
    if refused:
        _tell(changed, emit)
        lines = "".join(f"\n  {each.event.sentence}" for each in refused)
        raise InputError(
            f"--resume: {found.checkpoint} cannot go on with other settings than these were:{lines}\nSet them back; or begin a "
            f"new run from its weights: `ctpo convert to-hf {found.checkpoint} OUT`, then model.path=OUT and another run_dir"
        )
    return changed


def start_of(
    config: RunConfig, prompts: Sequence[Prompt], found: Resumable | None, changed: list[Difference], emit: Emit
) -> Start:
    """Returns where a run begins, after telling all that `changed` since the checkpoint `found`.

    Raises DataError where the prompts are others and data.allow_change is false, ConfigError where the schedule does not fit.
    """
    to_come = config.train.steps * config.train.optimizer_steps
    if found is None:
        config.optimizer.check_length(to_come)
        first = new_sampler(prompts, config.data, config.seed)
        return Start(Admission(first), Position(0, first.state()), to_come)
    state = found.state
    total = found.manifest["scheduler_steps"] + to_come - state.step * config.train.optimizer_steps
    config.optimizer.check_length(total)
    sampler = _sampler(config, prompts, found)
    of_prompts = _of_the_prompts(config, prompts, found, sampler)
    if found.config is None:
        emit(SettingsUnknown(str(found.checkpoint)))
    _tell([*changed, *of_prompts], emit)
    if sampler is None and not config.data.allow_change:
        lines = "".join(f"\n  {each.event.sentence}" for each in of_prompts)
        raise DataError(
            f"--resume: the prompts changed since {found.checkpoint}:{lines}\nResume with the same prompts; or set "
            "data.allow_change=true to go on with these, counted from their first on"
        )
    reopened, gone = _reopened(prompts, state.open, same=sampler is not None)
    sampler = sampler or new_sampler(prompts, config.data, config.seed)
    return Start(
        Admission(sampler, state.groups, reopened),
        Position(state.groups, sampler.state(), reopened),
        total,
        state.step,
        state.samples,
        dict(state.accuracies),
        gone=gone,
        owed=tuple(step for step in state.owed if step < state.step),  # that of its own step is due anyway
        alarms=state.alarms,
    )


def _reopened(
    prompts: Sequence[Prompt], groups: Sequence[OpenGroup], *, same: bool
) -> tuple[tuple[Admitted, ...], tuple[int, ...]]:
    """Returns the groups that go on, and the numbers of those that cannot, as the prompts are not the `same`."""
    if not same:
        return (), tuple(group.number for group in groups)
    wanted = {group.prompt for group in groups}
    found = {prompt.key: prompt for prompt in prompts if prompt.key in wanted}
    return tuple(Admitted(GroupId(each.number), found[each.prompt], each.version) for each in groups), ()


def _tell(changed: list[Difference], emit: Emit) -> None:
    for each in changed:
        emit(each.event)


def _sampler(config: RunConfig, prompts: Sequence[Prompt], found: Resumable) -> Sampler | None:
    """Returns the order of prompts behind the checkpoint; None where the prompts are others."""
    try:
        return restored_sampler(prompts, config.data, config.seed, found.state.cursor)
    except DataError:
        return None


def _of_the_prompts(config: RunConfig, prompts: Sequence[Prompt], found: Resumable, same: Sampler | None) -> list[Difference]:
    """Returns what differs in the prompts, and in the settings that they are made of, where the checkpoint has them."""
    effect: Effect = "none" if same else "applies" if config.data.allow_change else "refused"
    why = {"none": "the prompts are the same", "applies": "these prompts are counted from their first on", "refused": ""}[effect]
    changed = []
    if not same:
        changed.append(Difference(*_what_differs(config, prompts, found.state.cursor), effect, why))
    if found.config is not None:
        now = config.data.model_dump(mode="json")
        for key in PROMPT_KEYS:
            name = key.removeprefix("data.")
            if found.config["data"][name] != now[name]:
                changed.append(Difference(key, found.config["data"][name], now[name], effect, why))
    return changed


def _what_differs(config: RunConfig, prompts: Sequence[Prompt], cursor: dict[str, Any]) -> tuple[str, Any, Any]:
    """Returns what is not as it was when `cursor` was kept: the sources and pools, or else the prompts in them."""
    before, now = parts_in(cursor), parts_in(new_sampler(prompts, config.data, config.seed).state())
    if before != now:
        return "sources and pools of the prompts", before, now
    files = ", ".join((config.data.train, *(source.path for source in config.data.mixture)))
    return f"prompts of {files}", f"{cursor['count']} prompts", f"{len(prompts)} with other contents"


def _of_the_model(found: Resumable, config: RunConfig, shape: ModelShape) -> list[Difference]:
    """Returns what differs between the model's description in a checkpoint and in model.path."""
    stored = {name.removeprefix(f"{MODEL}/"): each for name, each in found.manifest["files"].items() if name.startswith(MODEL)}
    there, here = found.checkpoint / MODEL, Path(config.model.path)
    changed = []
    if MODEL_CONFIG in stored:
        changed += shapes_that_differ(parse_config(read_json(there / MODEL_CONFIG), str(there / MODEL_CONFIG)), shape)
    for name in sorted({*stored, *(path.name for path in here.glob("*.jinja"))} - {MODEL_CONFIG}):
        digests = stored[name]["digest"] if name in stored else ABSENT, _digest(here / name)
        if digests[0] == digests[1]:
            continue
        matters = name == "tokenizer.json" and ABSENT not in digests and _token_ids(there / name) != _token_ids(here / name)
        effect: Effect = "refused" if matters else "applies"
        why = "token ids mean other texts than the model has learnt" if matters else ""
        before, now = map(_content, digests)
        changed.append(Difference(f"{name} in model.path", before, now, effect, why))
    return changed


def _digest(file: Path) -> str:
    return file_hash(file) if file.is_file() else ABSENT


def _content(digest: str) -> str:
    return ABSENT if digest == ABSENT else f"content {digest[:8]}"


def _token_ids(tokenizer: Path) -> Any:
    """Returns the parts of a tokenizer.json that give texts their ids; None for what is none."""
    try:
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        return content["model"]["vocab"], [(each["id"], each["content"]) for each in content["added_tokens"]]
    except (ValueError, KeyError, TypeError):
        return None
