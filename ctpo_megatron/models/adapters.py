"""Which tensors the adapters of a model are made of: their names, shapes and cuts. Needs neither torch nor megatron.

The adapters of one parameter of Megatron's are kept beside it, one pair for each of its Hugging Face tensors:

    base                          A                          B                                m of DoRA
    rows are cut   (q, k, gate)   [rank, in]   whole         [out, rank]  its rows are cut    [out]  its rows
    columns        (o, down)      [rank, in]   its columns   [out, rank]  whole               [out]  whole

so what a rank's A and B give together is the piece of the base that the same rank holds. Every expert has pairs of its own, on
the ranks that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.adapter import TARGETS, LoraConfig, Target
from ctpo_megatron.config.model import MoeConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.families import FAMILIES
from ctpo_megatron.models.shape import Experts, LatentAttention, ModelShape
from ctpo_megatron.models.tensors import COLUMN, DENSE_PROJECTIONS, ROW, WHOLE, HfTensor, hf_tensors

ADAPTER = "adapter"  # in the keys of A and B, the name of what holds them beside a linear layer
WEIGHT = ".weight"
PART = "+"  # which is in no key


@dataclass(frozen=True, slots=True)
class AdaptedTensor:
    """A tensor of the model and the pair that is added to it; `m`: the lengths of the sum's rows, where they are trained."""

    target: Target
    base: HfTensor
    a: HfTensor
    b: HfTensor
    m: HfTensor | None

    @property
    def parts(self) -> list[HfTensor]:
        """What is trained."""
        return [self.a, self.b] if self.m is None else [self.a, self.b, self.m]


def target_names(shape: ModelShape) -> dict[Target, str]:
    """What the model's own files call each projection; where it has experts, what they call that of an expert."""
    names: dict[Target, str] = {target: target for target in TARGETS}
    if shape.experts is not None:
        mixture = FAMILIES[shape.family].mixture
        names |= {"gate_proj": mixture.gate, "up_proj": mixture.up, "down_proj": mixture.down}
    return names


def adapted_tensors(shape: ModelShape, adapter: LoraConfig) -> list[AdaptedTensor]:
    """Every pair, in the order of the model's tensors, under the names of peft's files without "base_model.model."."""
    found = []
    names = target_names(shape)
    of_experts = {names[target]: target for target in adapter.targets}
    others = {str(target): target for target in adapter.targets}
    for base in hf_tensors(shape):
        name = base.name.removesuffix(WEIGHT)
        target = (others if base.expert is None else of_experts).get(name.rpartition(".")[2])
        if name == base.name or target is None:
            continue
        rows, columns = base.shape
        key = f"{base.key.removesuffix(WEIGHT)}.{ADAPTER}.{target}"
        by_column, place = base.cut.dim == 1, (base.layer, base.expert)
        of_rows = WHOLE if by_column else COLUMN
        a = HfTensor(f"{name}.lora_A.weight", (adapter.rank, columns), f"{key}.a", 0, ROW if by_column else WHOLE, *place)
        b = HfTensor(f"{name}.lora_B.weight", (rows, adapter.rank), f"{key}.b", 0, of_rows, *place)
        m = HfTensor(f"{name}.lora_magnitude_vector", (rows,), f"{key}.m", 0, of_rows, *place) if adapter.use_dora else None
        found.append(AdaptedTensor(target, base, a, b, m))
    return found


def adapter_tensors(shape: ModelShape, adapter: LoraConfig) -> list[HfTensor]:
    """What is trained of every pair, one after the other."""
    return [tensor for each in adapted_tensors(shape, adapter) for tensor in each.parts]


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
    if moe.bias_update_rate:
        raise ConfigError(
            f"moe.bias_update_rate = {moe.bias_update_rate} moves the routers' biases, which belong to the model that adapters "
            "leave as it is; set it to 0, or model.adapter to null."
        )
    wanted = [target for target in adapter.targets if target in DENSE_PROJECTIONS]
    if wanted:
        _check_experts(shape, shape.experts, adapter, wanted)


def _check_experts(shape: ModelShape, experts: Experts, adapter: LoraConfig, wanted: list[Target]) -> None:
    """Raise ConfigError for adapters of experts that peft would read as others, or not at all.

    With transformers 5, which joins gate and up of all experts in one tensor, peft joins what files hold for each expert: A of
    both one below the other, B in blocks, twice the rank, twice alpha. That is the same sum only under these conditions.
    """
    others = [target for target in adapter.targets if target not in DENSE_PROJECTIONS] or ["q_proj", "k_proj", "v_proj", "o_proj"]
    instead = f"allowed are those of attention: [{', '.join(others)}]."
    if experts.shared_ffn_hidden_size or not all(experts.layers):
        what = "shared experts" if experts.shared_ffn_hidden_size else "dense layers"
        raise ConfigError(
            f"model.adapter.targets: {', '.join(wanted)} are projections of routed experts and of {what} in this {shape.family}, "
            f"and peft reads these names as the routed experts' alone and would leave the others out; {instead}"
        )
    if adapter.use_dora:
        raise ConfigError(
            f"model.adapter.use_dora: peft has no DoRA of experts ({', '.join(wanted)}); set it to false, or {instead}"
        )
    if set(wanted) not in ({"gate_proj", "up_proj", "down_proj"}, {"down_proj"}):
        raise ConfigError(
            f"model.adapter.targets: of experts peft takes gate_proj, up_proj and down_proj together, or down_proj alone; found "
            f"{', '.join(wanted)}. Name all three, that one, or none of them."
        )
    if adapter.use_rslora and "gate_proj" in wanted:
        raise ConfigError(
            "model.adapter.use_rslora: peft doubles the rank of experts' gate and up, and would then scale them by sqrt(2) too "
            f"much; set it to false and alpha to {adapter.scale * adapter.rank:.10g}, which is the same scale."
        )
