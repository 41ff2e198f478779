"""The adapter_config.json of the package peft: what we write, and what of others' we can take. Needs neither torch nor megatron.

What a file says and these adapters do not have is refused by name: none of it may be lost without a word.

Experts stand in the weights' file one by one, under the names that they have in the model's own files. With transformers 5, which
joins them in one tensor, peft joins A and B when it reads them (`models.adapters` checks that the sum stays the same). What it
saves from then on (`target_parameters`) is of a pair for gate and up together, which two pairs of that rank need not give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.adapters import adapter_tensors, target_names
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.shape import ModelShape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in the weights' file
# what peft (0.21) takes for absent keys; any other value changes what an adapter computes, or which tensors it has
_PLAIN: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
_WITHOUT_EFFECT = {  # on what is computed: how values were drawn, how training went, who wrote the file
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",  # but see _MOVES_BASE
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_MOVES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")  # beginnings of ways to draw A and B that change the base as well
_OWN = {"r", "lora_alpha", "use_rslora", "use_dora", "target_modules"}


def peft_config(shape: ModelShape, adapter: LoraConfig, base: str) -> dict[str, Any]:
    """What adapter_config.json says of an adapter of the model at `base`."""
    names = target_names(shape)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "target_modules": [names[target] for target in adapter.targets],
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": adapter.use_dora,
    }


def read_peft_config(directory: Path, shape: ModelShape) -> LoraConfig:
    """The adapter that a directory of peft's describes. Raises ModelError, naming the key, for what cannot be had here."""
    file = directory / CONFIG_FILE
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type is {values.get('peft_type')!r}; allowed is LORA.")
    if values.get("target_parameters"):
        raise ModelError(
            f"{file}: target_parameters = {values['target_parameters']!r} are tensors in which transformers 5 joins experts, "
            "with one pair for gate and up together; experts have a pair for each projection here. Let peft merge it "
            "(merge_and_unload), and begin with the merged model."
        )
    known = _OWN | _WITHOUT_EFFECT | _PLAIN.keys()
    for key, value in values.items():
        if key not in known and value not in (None, False, {}, []):
            raise ModelError(f"{file}: {key} = {value!r} is not known here, and may change what the adapter computes.")
        if key in _PLAIN and value not in (_PLAIN[key], None, [], {}):
            raise ModelError(f"{file}: {key} = {value!r}; adapters here have {_PLAIN[key]!r} only.")
    drawn = str(values.get("init_lora_weights"))
    if drawn.startswith(_MOVES_BASE):
        raise ModelError(
            f"{file}: init_lora_weights = {drawn!r} has changed the model that the adapter belongs to; let peft convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    targets = values.get("target_modules")
    if not isinstance(targets, list):
        router = ", the routers of a mixture among them" if targets == "all-linear" and shape.experts else ""
        raise ModelError(f"{file}: target_modules is {targets!r}{router}; allowed is a list of projections.")
    own = {name: target for target, name in target_names(shape).items()}
    try:
        return LoraConfig.model_validate(
            {
                "rank": values.get("r", 8),
                "alpha": values.get("lora_alpha", 8),
                "use_rslora": values.get("use_rslora", False),
                "use_dora": values.get("use_dora", False),
                "targets": [own.get(target, target) for target in targets],
            }
        )
    except ValueError as error:
        raise ModelError(f"{file}: it describes no adapter that can be had here: {error}") from error


def check_peft_config(directory: Path, shape: ModelShape, adapter: LoraConfig) -> None:
    """Raise ModelError where a directory of peft's describes another adapter than the configuration."""
    found = read_peft_config(directory, shape)
    checked: list[tuple[str, Any, Any]] = [
        ("rank", adapter.rank, found.rank),
        ("use_dora", adapter.use_dora, found.use_dora),
        ("targets", list(adapter.targets), list(found.targets)),
    ]
    if not math.isclose(adapter.scale, found.scale):
        checked += [("alpha", adapter.alpha, found.alpha), ("use_rslora", adapter.use_rslora, found.use_rslora)]
    for key, ours, theirs in checked:
        if ours != theirs:
            raise ModelError(
                f"{directory / CONFIG_FILE} says {theirs}, but model.adapter.{key} is {ours}; set model.adapter.{key} to it."
            )


def check_peft_names(directory: Path, names: set[str], shape: ModelShape, adapter: LoraConfig) -> None:
    """Raise ModelError unless the weights' file has exactly the pairs of the adapter. `names`: those in the file."""
    wanted = {PREFIX + tensor.name for tensor in adapter_tensors(shape, adapter)}
    for what, some in (("lacks", wanted - names), ("also holds, and the adapter has no place for", names - wanted)):
        if some:
            raise ModelError(f"{directory / WEIGHTS_FILE} {what} {len(some)} tensors, among them {min(some)}.")
