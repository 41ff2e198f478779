"""Mistral (7B, Nemo, Small up to 2501): Llama's layers, and a sliding window.

SGLang 0.5.23 serves this family by its Llama and passes over the window, so it must be as long as the longest sequence. An absent
`sliding_window` is 4,096 in transformers' class.
"""

from __future__ import annotations

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.families.family import Family, head_attention, model_shape
from ctpo_megatron.models.keys import Keys
from ctpo_megatron.models.rope import read_rope
from ctpo_megatron.models.shape import ModelShape


def _shape(keys: Keys) -> ModelShape:
    for key in ("attention_bias", "bias"):
        keys.must_be(key, False)  # SGLang reads them, transformers has no biases here
    keys.must_be("layer_types", None)  # transformers reads them in ministral only
    shape = model_shape(keys, attention=head_attention(keys), rope=read_rope(keys))
    _check_window(keys, shape)
    return shape


def _check_window(keys: Keys, shape: ModelShape) -> None:
    if "sliding_window" in keys.values and keys.values["sliding_window"] is None:
        return
    window = keys.size("sliding_window")
    if window < shape.max_positions:
        said = "" if "sliding_window" in keys.values else ", which is what transformers takes where the key is absent"
        raise ModelError(
            f"{keys.where}: sliding_window is {window}{said}, and {shape.context_key} is {shape.max_positions}; this package and "
            f"SGLang compute attention over the whole sequence. Set {shape.context_key} to {window} to train within the window, "
            "or sliding_window to null where the model was trained without one."
        )


MISTRAL = Family(
    _shape,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    nulls={"head_dim": None},
)
