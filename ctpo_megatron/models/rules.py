"""Which parallel layouts a model's shape allows, checked before anything is started. Needs neither torch nor megatron.

Rules that need only the sizes stand in `config.model.ParallelConfig`; docs/parallelism.md lists both kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.shape import Experts, HeadAttention, ModelShape

SHARED_FROM = 16  # common tokens, from which on reading them once is on by default


@dataclass(frozen=True, slots=True)
class Overlap:
    """What data- and context-parallel ranks tell each other while they compute."""

    grad_reduce: bool
    param_gather: bool


def overlap_of(shape: ModelShape, parallel: ParallelConfig, *, adapted: bool = False) -> Overlap:
    """What goes on beside computing: as configured, otherwise all that can. `adapted`: whether the model has adapters.

    Raises ConfigError for what cannot.
    """
    dense, several = shape.experts is None, parallel.dp * parallel.cp > 1
    if parallel.overlap_grad_reduce and not dense:
        raise ConfigError(
            f"parallel.overlap_grad_reduce: {shape.family} is a mixture, and an expert that no token went to has no gradient, "
            "for which megatron's overlapped reduction would wait; set it to null or false."
        )
    reduce = several and dense if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    if parallel.overlap_param_gather and not (dense and parallel.overlap_grad_reduce is not False):
        why = f"{shape.family} is a mixture" if not dense else "overlap_grad_reduce is false"
        raise ConfigError(
            f"parallel.overlap_param_gather goes with an overlapped reduction of gradients, but {why}; set it to null or false."
        )
    if parallel.overlap_param_gather and adapted:
        raise ConfigError(
            "parallel.overlap_param_gather: megatron gathers a module's weights before its forward pass, and adapters are used "
            "in that of the layer that they belong to; set it to null or false."
        )
    gather = reduce and several and not adapted if parallel.overlap_param_gather is None else parallel.overlap_param_gather
    return Overlap(reduce or gather, gather)


def check_layout(shape: ModelShape, parallel: ParallelConfig, *, adapted: bool = False) -> None:
    """Raise ConfigError when `parallel` cannot divide the model; the message names both numbers and the sizes that can.

    `adapted`: whether the model has adapters.
    """
    overlap_of(shape, parallel, adapted=adapted)
    tp = parallel.tp
    _divides("parallel.tp", tp, "attention heads", shape.num_heads)
    if isinstance(shape.attention, HeadAttention):
        _divides("parallel.tp", tp, "key-value heads", shape.attention.num_kv_heads)
    else:  # megatron cuts the down-projections before mcore/model/latent.py puts whole ones in their place
        _divides("parallel.tp", tp, "rows of kv_a_proj_with_mqa", shape.attention.kv_rank + shape.attention.rope_dim)
        _divides("parallel.tp", tp, "rows of q_a_proj", shape.attention.q_rank or tp)
    _divides("parallel.tp", tp, "hidden units", shape.hidden_size)
    if len(shape.expert_layers) < shape.num_layers:
        _divides("parallel.tp", tp, "feed-forward units", shape.ffn_hidden_size)
    _check_experts(shape, parallel)
    _check_stages(shape.num_layers, parallel)
    _check_stages_of_mixture(shape, parallel)


def check_shared_prompts(shape: ModelShape) -> None:
    """Raise ConfigError for a model whose samples cannot read a common prompt once."""
    if fault := _shared_prompts_fault(shape):
        raise ConfigError(f"train.share_prompts: {shape.family} {fault}; set train.share_prompts to auto or null.")


def shared_prompts(wanted: int | Literal["auto"] | None, shape: ModelShape, device: str) -> int | None:
    """Returns from how many common tokens on samples read a prompt once, on `device`, cpu or cuda; None: they never do.

    `wanted`: train.share_prompts. What it asks for and cannot be had was refused before.
    """
    if wanted != "auto":
        return wanted
    return SHARED_FROM if device == "cpu" and not _shared_prompts_fault(shape) else None


def _shared_prompts_fault(shape: ModelShape) -> str:
    """Returns what keeps a model from it; empty where nothing does."""
    if shape.experts is not None:
        return "is a mixture of experts, whose load, auxiliary losses and recorded routing count every token of every sample"
    if not isinstance(shape.attention, HeadAttention):
        return "has latent attention, which finds the positions of its tokens itself"
    return ""


def layers_per_stage(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, all its chunks together. Meaningful for layouts that `check_layout` passes."""
    ends = (parallel.first_stage_layers, parallel.last_stage_layers)
    middle = parallel.pp - sum(end is not None for end in ends)
    each = (num_layers - sum(end or 0 for end in ends)) // middle if middle else 0
    stages = [each] * parallel.pp
    for stage, end in zip((0, -1), ends, strict=True):
        if end is not None:
            stages[stage] = end
    return stages


def stage_layers(shape: ModelShape, parallel: ParallelConfig) -> list[list[tuple[int, ...]]]:
    """Layer numbers, from 0, as [pipeline stage][model chunk], dealt out as megatron does.

    With interleaving, chunk 0 of all stages comes first in the model, then chunk 1. The layout must pass `check_layout`.
    """
    counts = layers_per_stage(shape.num_layers, parallel)
    stages: list[list[tuple[int, ...]]] = [[] for _ in counts]
    first = 0
    for _ in range(parallel.vpp):
        for stage, count in zip(stages, counts, strict=True):
            stage.append(tuple(range(first, first + count // parallel.vpp)))
            first += count // parallel.vpp
    return stages


def _check_experts(shape: ModelShape, parallel: ParallelConfig) -> None:
    experts: Experts | None = shape.experts
    if experts is None:
        for name, size in (("ep", parallel.ep), ("etp", parallel.etp)):
            if size > 1:
                raise ConfigError(f"parallel.{name} = {size}, but {shape.family} is a dense model without experts; allowed is 1.")
        return
    _divides("parallel.ep", parallel.ep, "experts", experts.count)
    _divides("parallel.etp", parallel.etp, "feed-forward units of each expert", experts.ffn_hidden_size)
    if experts.shared_ffn_hidden_size:
        _divides("parallel.tp", parallel.tp, "feed-forward units of the shared expert", experts.shared_ffn_hidden_size)


def _check_stages(num_layers: int, parallel: ParallelConfig) -> None:
    pp, vpp, first, last = parallel.pp, parallel.vpp, parallel.first_stage_layers, parallel.last_stage_layers
    if first is None and last is None:
        if vpp == 1:
            _divides("parallel.pp", pp, "layers", num_layers)
        _divides("parallel.pp * parallel.vpp", pp * vpp, "layers", num_layers)
        return
    middle = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    given = f"parallel.first_stage_layers = {first}, parallel.last_stage_layers = {last} and the model's {num_layers} layers"
    if rest < middle or (rest > 0 and middle == 0):
        raise ConfigError(
            f"{given} leave {rest} layers for {middle} other stages; each stage needs at least one, and each layer a stage."
        )
    if middle and rest % middle:
        raise ConfigError(f"{given} leave {rest} layers, which the {middle} other pipeline stages cannot share equally.")
    uneven = [stage for stage in layers_per_stage(num_layers, parallel) if stage % vpp]
    if uneven:
        raise ConfigError(
            f"{given} give a pipeline stage {uneven[0]} layers, which parallel.vpp = {vpp} does not divide; "
            "the chunks of a stage have equal numbers of layers."
        )


def _check_stages_of_mixture(shape: ModelShape, parallel: ParallelConfig) -> None:
    """megatron 0.16.1 gives every rank of a mixture an optimizer for experts, and cannot save the state of an empty one."""
    if shape.experts is None:
        return
    for number, chunks in enumerate(stage_layers(shape, parallel)):
        layers = [layer for chunk in chunks for layer in chunk]
        if not set(layers) & set(shape.expert_layers):
            raise ConfigError(
                f"pipeline stage {number} has the layers {', '.join(map(str, layers))} and none with experts, and the state of "
                "its optimizer cannot be saved; each stage of a mixture needs a layer with experts. Change parallel.pp, "
                "parallel.first_stage_layers or parallel.last_stage_layers."
            )


def _divides(name: str, size: int, what: str, count: int) -> None:
    if count % size:
        raise ConfigError(f"{name} = {size} does not divide the model's {count} {what}; allowed are {_divisors(count)}.")


def _divisors(count: int) -> str:
    return ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
