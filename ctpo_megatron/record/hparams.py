"""What TensorBoard's tab HParams compares runs by: some of their settings, and the numbers that tell how they went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SECTIONS = ("algorithm", "optimizer")  # of which all settings are shown
SETTINGS = (
    *("seed", "model.path", "data.train"),
    *("train.steps", "train.prompts_per_step", "train.optimizer_steps", "train.staleness", "train.oversample"),
    *("rollout.group_size", "rollout.temperature", "rollout.top_p", "rollout.max_turns", "rollout.max_response_tokens"),
    *("rollout.tool.type", "rollout.reward.type", "rollout.dynamic.max_refills"),
    *("parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep", "parallel.dp", "weights.type"),
)
MEASURES = ("eval/accuracy", "reward/mean", "rollout/response_tokens", "train/entropy", "train/clip_fraction", "time/step")
TAGS = "_hparams_/"  # how the tags begin under which TensorBoard finds them

Setting = bool | float | str


def settings_shown(config: Mapping[str, Any]) -> dict[str, Setting]:
    """Returns the settings of a run to compare it by, dotted key to value, from its configuration as nested JSON values.

    Lists and what is null are left out: a column of TensorBoard has values of one type.
    """
    leaves = dict(_leaves(config, ""))
    return {key: value for key, value in leaves.items() if key in SETTINGS or key.partition(".")[0] in SECTIONS}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Setting]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, bool | int | float | str):
        yield key, value
