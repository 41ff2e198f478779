"""Rows of tools/gpu_check.py about memory, against `ctpo plan`'s formulas, and about the optimizer on the host."""

from __future__ import annotations

import functools
import os
import statistics
import time
from typing import Any, NamedTuple

import torch
from gpu_check_measure import peak_bytes
from gpu_check_rank import HOST, LR, _likelihood, packed, write_model
from gpu_check_rows import Found, Place

from ctpo_megatron.config.model import ModelConfig, MoeConfig, ParallelConfig
from ctpo_megatron.config.rollout import DataConfig, RolloutConfig
from ctpo_megatron.config.train import OptimizerConfig, TrainConfig
from ctpo_megatron.config.weights import BroadcastTransport
from ctpo_megatron.mcore.host import megatron_region
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.planning.memory import StageMemory, plan_stages
from ctpo_megatron.planning.run import PlannedRun
from ctpo_megatron.planning.topology import make_topology
from ctpo_megatron.ports import free_port

WITHIN = 0.1
GIB = 2**30
ADAMW_PARAMETERS, DRY_PARAMETERS = 2**27, 2**16
LARGE: dict[str, Any] = {  # like Qwen3-1.7B, with 6 of its 28 layers
    "model_type": "qwen3",
    "num_hidden_layers": 6,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SMALL: dict[str, Any] = LARGE | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 2048}


class Trained(NamedTuple):
    """A rank after its first optimizer step, when everything that stays is there, and what was planned for it."""

    rank: TrainerRank
    placed: list[Any]
    planned: StageMemory
    tokens: int
    parameters: int


@functools.cache
def trained(place: Place) -> Trained:
    """Built once in a process; the rows below share it."""
    config, length = (SMALL, 64) if place.dry else (LARGE, 4096)
    path = write_model(place.folder / "memory", config, place.device)
    rank = TrainerRank(
        str(path),
        ParallelConfig(),
        OptimizerConfig(lr=LR),
        RankInfo(0, 1, HOST, free_port(HOST)),
        device=place.device,
        dtype="bfloat16",
        seed=1,
    )
    placed = rank.place([packed([length, length], config["vocab_size"], 0)])
    rank.train_step(placed, _likelihood, 1.0)
    stage = plan_stages(_run(str(path), 2 * length, place.device), rank.shape, 1)[0]
    return Trained(rank, placed, stage.memory, 2 * length, stage.parameters.total)


def _run(path: str, tokens: int, device: str) -> PlannedRun:
    parallel, rollout, weights = ParallelConfig(), RolloutConfig(), BroadcastTransport()
    return PlannedRun(
        model=ModelConfig(path=path, dtype="bfloat16"),
        data=DataConfig(train="none"),
        parallel=parallel,
        moe=MoeConfig(),
        optimizer=OptimizerConfig(lr=LR),
        train=TrainConfig(max_tokens_per_micro_batch=tokens),
        rollout=rollout,
        weights=weights,
        topology=make_topology(parallel, rollout.engine, weights, device),
        has_reference=False,
        has_teachers=False,
        copied_teachers=0,
        host_copies=0,
        keeps_copies=False,
        has_critic=False,
        top_k=0,
    )


def resident_row(place: Place) -> Found:
    """What weights, gradients and the optimizer's state take; on a CPU their tensors are counted."""
    state = trained(place)
    if place.device == "cuda":
        torch.cuda.synchronize()
        placed = sum(t.numel() * t.element_size() for t in _tensors(state.placed))
        found = torch.cuda.memory_allocated() - placed
    else:
        found = _held(state.rank)
    planned = state.planned.weights + state.planned.gradients + state.planned.optimizer
    return against_plan(found, planned, f"; {found / state.parameters:.2f} bytes a parameter")


def peak_row(place: Place) -> Found:
    """The most that a training step holds."""
    state, planned = trained(place), trained(place).planned
    stays = torch.cuda.memory_allocated()
    found = stays + peak_bytes(lambda: state.rank.train_step(state.placed, _likelihood, 1.0))
    parts = (planned.weights, planned.gradients, planned.optimizer, planned.activations, planned.working, planned.head)
    layers = "portable layers" if state.rank._stepper.portable else "TransformerEngine's layers"
    text = f"; beyond what stays {(found - stays) / GIB:.2f} GiB, planned {sum(parts[3:]) / GIB:.2f}; {layers}"
    return against_plan(found, sum(parts), text)


def against_plan(found: int, planned: int, more: str = "") -> Found:
    """A number of bytes beside the one that was planned."""
    apart = found / planned - 1
    return Found(f"{found / GIB:.3g} GiB, planned {planned / GIB:.3g} ({apart:+.1%}){more}", abs(apart) <= WITHIN)


def snapshot_row(place: Place) -> Found:
    """The memory and the time that it takes to copy a checkpoint's content to the host."""
    from ctpo_megatron.mcore.checkpoint.snapshot import take_snapshot

    state = trained(place)
    with megatron_region(state.rank.device):
        begun = time.perf_counter()
        peak = peak_bytes(lambda: take_snapshot(state.rank.models, state.rank.optimizer))
        taken = time.perf_counter() - begun
    return Found(f"{peak / GIB:.2f} GiB on the device, {peak / state.parameters:.2f} bytes a parameter, {taken:.1f} s")


def adamw_row(place: Place) -> Found:
    """One step of torch's AdamW on the host, as `optimizer.cpu_offload` makes it, on one thread and on more."""
    size = DRY_PARAMETERS if place.dry else ADAMW_PARAMETERS
    parameter = torch.nn.Parameter(torch.ones(size))
    parameter.grad = torch.ones(size)
    optimizer = torch.optim.AdamW([parameter])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, min(8, os.cpu_count() or 1)):
            torch.set_num_threads(threads)
            optimizer.step()
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - begun)
            found.append(f"{statistics.median(seconds) / size * 1e9:.2f} ns a parameter on {threads} threads")
    finally:
        torch.set_num_threads(before)
    return Found(", ".join(found))


def _tensors(placed: list[Any]) -> list[torch.Tensor]:
    parts = [part for each in placed for part in (each.tokens, each.sequences)]
    values = [getattr(part, name) for part in parts for name in part.__dataclass_fields__]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _held(rank: TrainerRank) -> int:
    """Bytes of the parameters, of the buffers of gradients, and of the optimizer's state and float32 copies."""
    assert rank.optimizer is not None
    storages: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for model in rank.models:
        for parameter in model.parameters():
            count(parameter)
            count(getattr(parameter, "main_grad", None))
    for part in rank.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                count(parameter)
                for value in part.optimizer.state[parameter].values():
                    count(value)
    return sum(storages.values())
