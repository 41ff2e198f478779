"""What a Hugging Face model directory says about the model, checked before anything is started.

Needs neither torch nor megatron, so `ctpo` can refuse a wrong directory in the first second. The families are in `families/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ModelError, near_miss
from ctpo_megatron.models.families import FAMILIES
from ctpo_megatron.models.families.refused import REFUSED
from ctpo_megatron.models.files import check_safetensors, check_tokenizer, read_json
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.shape import ModelShape


def read_hf_config(path: str | Path) -> ModelShape:
    """The shape of the model in `path`, after checking that the directory is complete.

    Raises ModelError for a missing or broken file and for a model that this package cannot train.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory. model.path must be a local directory in Hugging Face format.")
    config = read_json(directory / "config.json")
    check_tokenizer(directory)
    check_safetensors(directory)
    return parse_config(config, str(directory / "config.json"))


def parse_config(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that the content of a config.json describes; `where` names it in errors (ModelError).

    Keys are those of transformers' configuration classes, version 4 and 5; absent ones have the defaults of version 5.19.
    """
    family = Keys(config, where).get("model_type", str)
    if family in REFUSED:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{where}: model_type {family!r} is not supported: {REFUSED[family]}. Supported are {known}.")
    if family not in FAMILIES:
        hint = near_miss(family, FAMILIES)
        raise ModelError(f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}.{hint}")
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        raise ModelError(
            f"{where}: quantization_config says that the weights are quantised ({method}); training needs them in bfloat16 or "
            "float32. Convert the checkpoint to bfloat16 first and remove quantization_config."
        )
    return FAMILIES[family].shape(FAMILIES[family].keys(config, where))
