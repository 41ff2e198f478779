"""Which tensors of a model its servers keep in fp8, in blocks of 128 x 128 numbers with a scale each, and what they are called.

The form is DeepSeek-V3's, which SGLang reads: `NAME.weight` in float8_e4m3fn, and `NAME.weight_scale_inv` in float32 with the
number that each block of it is multiplied by. Needs neither torch nor megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.shape import LatentAttention, ModelShape
from ctpo_megatron.models.tensors import HfTensor

BLOCK = 128  # rows and columns that share a scale
SCALE_SUFFIX = "_scale_inv"
SETTING = "weights.quantization=fp8"


def is_quantised(tensor: HfTensor) -> bool:
    """Whether servers keep it in fp8: matrices of layers, but for routers. All else stays in the model's number format."""
    return tensor.layer is not None and len(tensor.shape) == 2 and not tensor.key.endswith(".router.weight")


def scale_of(tensor: HfTensor) -> HfTensor:
    """The tensor of the scales of a quantised one: its cut is the same, counted in blocks."""
    return replace(tensor, name=tensor.name + SCALE_SUFFIX, shape=scale_shape(tensor.shape), precise=True)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks a matrix of `shape` has along each dimension; the last ones may be smaller."""
    return tuple(-(-size // BLOCK) for size in shape)


def served_tensors(tensors: list[HfTensor]) -> Iterator[HfTensor]:
    """Yields what servers are sent: `tensors`, and behind each quantised one its scales."""
    for tensor in tensors:
        yield tensor
        if is_quantised(tensor):
            yield scale_of(tensor)


def server_config() -> dict[str, Any]:
    """What a server's config.json says besides the model's own."""
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return {"quantization_config": quantisation}


def check_attention(shape: ModelShape) -> None:
    """Raises ConfigError for a model that no server of this package's is proven to hold in fp8."""
    if isinstance(shape.attention, LatentAttention):
        raise ConfigError(
            f"{SETTING} is for models whose heads have keys and values of their own; {shape.family} has latent attention, whose "
            "up-projection SGLang takes apart after loading, so that no digest fits. Set weights.quantization to null"
        )


def check_cut(tensor: HfTensor, dim: int | None, piece: int, tp: int) -> None:
    """Raises ConfigError where a quantised tensor, of which each of a server's `tp` ranks has `piece` along `dim`, is not made of
    whole blocks there."""
    sizes = [piece if each == dim else size for each, size in enumerate(tensor.shape)]
    if any(size % BLOCK for size in sizes):
        raise ConfigError(
            f"{SETTING}: {tensor.name} {list(tensor.shape)} is {sizes} on each of rollout.engine.tp={tp} ranks, and SGLang "
            f"wants whole blocks of {BLOCK} x {BLOCK}. Choose a tp that leaves multiples of {BLOCK}, or set weights.quantization "
            "to null"
        )
