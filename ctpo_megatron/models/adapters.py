"""Which tensors the adapters of a model are made of: their names, shapes and cuts. Needs neither torch nor megatron.

The adapters of one parameter of Megatron's are kept beside it, one pair for each of its Hugging Face tensors:

    base                          A                          B
    rows are cut   (q, k, gate)   [rank, in]   whole         [out, rank]  its rows are cut
    columns        (o, down)      [rank, in]   its columns   [out, rank]  whole

so what a rank's A and B give together is the piece of the base that the same rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import MoeConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.shape import LatentAttention, ModelShape
from ctpo_megatron.models.tensors import COLUMN, DENSE_PROJECTIONS, ROW, WHOLE, HfTensor, hf_tensors

ADAPTER = "adapter"  # in the keys of A and B, the name of what holds them beside a linear layer
WEIGHT = ".weight"
PART = "+"  # which is in no key


@dataclass(frozen=True, slots=True)
class AdaptedTensor:
    """A tensor of the model and the pair that is added to it."""

    base: HfTensor
    a: HfTensor
    b: HfTensor


def adapted_tensors(shape: ModelShape, adapter: LoraConfig) -> list[AdaptedTensor]:
    """Every pair, in the order of the model's tensors. A and B have the names of peft's files without "base_model.model."."""
    found = []
    for base in hf_tensors(shape):
        name = base.name.removesuffix(WEIGHT)
        target = name.rpartition(".")[2]
        if name == base.name or target not in adapter.targets:
            continue
        rows, columns = base.shape
        key = f"{base.key.removesuffix(WEIGHT)}.{ADAPTER}.{target}"
        by_column = base.cut.dim == 1
        a = HfTensor(f"{name}.lora_A.weight", (adapter.rank, columns), f"{key}.a", 0, ROW if by_column else WHOLE, base.layer)
        b = HfTensor(f"{name}.lora_B.weight", (rows, adapter.rank), f"{key}.b", 0, WHOLE if by_column else COLUMN, base.layer)
        found.append(AdaptedTensor(base, a, b))
    return found


def adapter_tensors(shape: ModelShape, adapter: LoraConfig) -> list[HfTensor]:
    """A and B of every pair, one after the other."""
    return [tensor for each in adapted_tensors(shape, adapter) for tensor in (each.a, each.b)]


def part_name(key: str, tensor: str) -> str:
    """The name of an adapter's tensor as a part of the parameter `key`."""
    return f"{key}{PART}{tensor}"


def key_of(part: str) -> str:
    """The parameter that a part belongs to; a parameter's own key is that itself."""
    return part.partition(PART)[0]


def check_adapter(shape: ModelShape, adapter: LoraConfig, moe: MoeConfig) -> None:
    """Raise ConfigError for adapters that this model cannot have."""
    if isinstance(shape.attention, LatentAttention):
        raise ConfigError(
            f"model.adapter: {shape.family} has latent attention, whose projections have other names, and no adapters here; "
            "train all weights (model.adapter: null), or a model with heads of their own."
        )
    if shape.experts is None:
        return
    wanted = [target for target in adapter.targets if target in DENSE_PROJECTIONS]
    if wanted:
        others = ", ".join(target for target in adapter.targets if target not in DENSE_PROJECTIONS)
        raise ConfigError(
            f"model.adapter.targets: {', '.join(wanted)} are experts' in {shape.family}, a mixture, and experts have no adapters "
            f"here; allowed are those of attention: [{others or 'q_proj, k_proj, v_proj, o_proj'}]."
        )
    if moe.bias_update_rate:
        raise ConfigError(
            f"moe.bias_update_rate = {moe.bias_update_rate} moves the routers' biases, which belong to the model that adapters "
            "leave as it is; set it to 0, or model.adapter to null."
        )
