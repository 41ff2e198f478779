"""Which settings of a run that resumes differ from the checkpoint's, and what that means.

A checkpoint says how it was, the configuration what is wanted, and the counts in the checkpoint what was done. Settings are the
present configuration's, except where tensors or counts of the checkpoint would mean something else under them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ctpo_megatron.config import RunConfig
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.events import SettingDiffers

Effect = Literal["applies", "none", "refused"]
WORDS: dict[Effect, str] = {"applies": "applies from now on", "none": "has no effect on a resume", "refused": "refused"}
PROMPT_KEYS = ("data.train", "data.system_prompt")  # what the prompts that are counted are made of
ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting: its value in the checkpoint and the present one, and what becomes of it."""

    key: str
    before: Any
    now: Any
    effect: Effect
    why: str = ""

    @property
    def event(self) -> SettingDiffers:
        """Returns it as what happened."""
        meaning = WORDS[self.effect] + (f": {self.why}" if self.why else "")
        return SettingDiffers(self.key, shown(self.before), shown(self.now), self.effect, meaning)


_SCHEDULE = "the schedule is the present one, at the place where the run is"
_EVALUATION = "accuracies from now on are not of the same evaluation"
# by key, or by the section above it; what is not listed applies and needs no words
_WHY: dict[str, tuple[Effect, str]] = {
    "run_dir": ("applies", "the run goes on in this directory"),
    "seed": ("applies", "the prompts that are left of this epoch come in another order, each once"),
    "model.path": (
        "applies",
        "tokenizer and templates are read there, and the reference policy if it has no path; weights are not",
    ),
    "model.adapter": ("refused", "the checkpoint is of other adapters"),
    "model.adapter.path": ("none", "adapters are the checkpoint's"),
    "data.mixture": ("applies", "weights count from now on; other sources or prompts are another matter"),
    "data.pools": ("applies", "weights count from now on, and so do borders between pools that are measured"),
    "data.curriculum": ("applies", "it is asked after the next step"),
    "data.eval": ("applies", _EVALUATION),
    "eval": ("applies", _EVALUATION),
    "eval.every": ("applies", ""),
    "eval.servers": ("applies", ""),
    "parallel": ("applies", "the same tensors are cut in another way"),
    "parallel.overlap_grad_reduce": ("applies", "the sums are the same"),
    "parallel.overlap_param_gather": ("applies", "the weights are the same"),
    "optimizer.lr": ("applies", _SCHEDULE),
    "optimizer.min_lr": ("applies", _SCHEDULE),
    "optimizer.schedule": ("applies", _SCHEDULE),
    "optimizer.warmup_steps": ("applies", f"{_SCHEDULE}; warm-up is counted from the run's first optimizer step"),
    "optimizer.wsd_decay_steps": ("applies", _SCHEDULE),
    "optimizer.wsd_decay": ("applies", _SCHEDULE),
    "algorithm.advantage.critic.lr": ("applies", _SCHEDULE),
    "algorithm.advantage.critic.warmup_steps": ("applies", "they are counted from the run's first step"),
    "train.steps": ("applies", "of the whole run, the steps that are done included; schedules that fall end there"),
    "train.prompts_per_step": ("applies", "prompts are counted one by one, so none is repeated or left out"),
    "train.staleness": ("applies", "groups that are open and too old for it are aborted when they are finished"),
    "train.optimizer_steps": ("applies", "the schedule counts the optimizer steps that were made"),
    "rollout.group_size": ("applies", "prompts are counted, whatever the size of their groups"),
    "rollout.reward": ("applies", "what was sampled and not trained on yet is used again only where its verdict stays the same"),
    "rollout.environment": ("applies", "attempts that were begun in the other one begin anew"),
    "algorithm.reference": ("applies", "the reference policy is read anew"),
    "algorithm.distillation": ("applies", "its teachers are read, or asked, anew"),
    "sft": ("none", "it belongs to `ctpo sft`"),
    "alarms": ("applies", "the steps before are judged by it too, so some alarms may be raised or cleared at once"),
    "alarms.webhook": ("applies", ""),
}
_OF_TRAIN: tuple[Effect, str] = ("none", "it belongs to `ctpo train`")
_WHY_SUPERVISED: dict[str, tuple[Effect, str]] = {
    "sft": ("applies", ""),
    "sft.steps": ("applies", "of the whole run, the steps that are done included; schedules that fall end there"),
    "sft.epochs": ("applies", "of the whole run, the examples that were trained on included; schedules that fall end there"),
    "sft.eval": ("applies", "losses from now on are not of the same demonstrations"),
    **dict.fromkeys(("algorithm", "eval", "rollout", "train.steps", "train.prompts_per_step", "train.staleness"), _OF_TRAIN),
}
# fields of a model's shape that change no tensor and no result, or that training alone reads
_SHAPE_APPLIES = ("max_positions", "experts.aux_loss_coeff")
_SHAPE_SKIPPED = (
    "dtype",
    "mtp_layers",
)  # a checkpoint's config.json names the format of its weights, and leaves those layers out


def settings_that_differ(before: dict[str, Any], now: dict[str, Any], *, supervised: bool = False) -> list[Difference]:
    """Returns all settings of two configurations, as nested sections, that differ. A section of another `type` counts as one.

    `supervised`: what they mean to a run of `ctpo sft`. Left out are `PROMPT_KEYS` and model.dtype, whose meaning depends on more
    than the configuration, and settings that the checkpoint's release did not know and that have their default.
    """
    found = []
    for key, old, new in _walk(before, now, ""):
        if key in (*PROMPT_KEYS, "model.dtype") or (old == ABSENT and new == _default(key)):
            continue
        section, _, _ = key.rpartition(".")
        words = _WHY | _WHY_SUPERVISED if supervised else _WHY
        effect, why = next((words[each] for each in (key, section, section.partition(".")[0]) if each in words), ("applies", ""))
        if key == "algorithm.advantage" and "gae" in (kinds := [_kind(old), _kind(new)]):
            effect, why = "refused", f"the model in the checkpoint has {'no' if kinds[1] == 'gae' else 'a'} value head"
        found.append(Difference(key, old, new, effect, why))
    return found


def shapes_that_differ(before: ModelShape, now: ModelShape) -> list[Difference]:
    """Returns what of the model's architecture differs. It is refused where the checkpoint's tensors would not fit, or would
    compute something else."""
    found = []
    for key, old, new in _walk(asdict(before), asdict(now), ""):
        if key in _SHAPE_SKIPPED:
            continue
        effect: Effect = "applies" if key in _SHAPE_APPLIES else "refused"
        why = "" if effect == "applies" else "the checkpoint is of another model"
        found.append(Difference(f"config.json in model.path, {key}", old, new, effect, why))
    return found


def dtype_that_differs(stored: str, before: str | None, config: RunConfig) -> list[Difference]:
    """Returns the difference in number formats, if there is one. `stored`: the weights', `before`: the checkpoint's model.dtype.

    What `auto` means where the device is not known yet is left to the ranks, which compare it again.
    """
    now, device = config.model.dtype, config.cluster.device
    known = now if now != "auto" or device == "auto" else config.model.dtype_on(device)
    if known not in ("auto", stored):
        return [Difference("model.dtype", stored, known, "refused", "weights and moments would be rounded")]
    if before is None or before == now:
        return []
    return [Difference("model.dtype", before, now, "none", f"the weights are {stored}")]


def shown(value: Any) -> str:
    """Returns a setting as a person would write it in YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str) and value and "\n" not in value and ", " not in value:
        return value
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else json.dumps(value, ensure_ascii=False)


def _walk(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields key, old and new value of all that differs below `key`."""
    if not (isinstance(before, dict) and isinstance(now, dict)) or before.get("type") != now.get("type"):
        if before != now:
            yield key, before, now
        return
    for name in dict.fromkeys((*now, *before)):
        yield from _walk(before.get(name, ABSENT), now.get(name, ABSENT), f"{key}.{name}" if key else name)


def _kind(section: Any) -> str | None:
    return section.get("type") if isinstance(section, dict) else None


def _default(key: str) -> Any:
    """Returns the default of a setting, as JSON values."""
    value: Any = RunConfig.model_validate({"name": "-", "run_dir": "-", "model": {"path": "-"}, "data": {"train": "-"}})
    value = value.model_dump(mode="json")
    for part in key.split("."):
        if value is None:  # a section that is left out by default
            return _default_within(key)
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _default_within(key: str) -> Any:
    """Returns the default of a setting in sections of one kind each, as a JSON value; None where there is no such default."""
    section: type[BaseModel] = RunConfig
    *sections, name = key.split(".")
    for each in sections:
        annotation = section.model_fields[each].annotation if each in section.model_fields else None
        kinds = [
            kind for kind in (get_args(annotation) or (annotation,)) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if len(kinds) != 1:
            return None
        (section,) = kinds
    field = section.model_fields.get(name)
    return None if field is None or field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
