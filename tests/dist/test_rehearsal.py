"""A rehearsal held against the real thing: memory against the allocator, collectives against those of two ranks; its bridges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import RehearsalError
from ctpo_megatron.jobs.rehearse import in_own_process
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.mcore.rehearsal.inputs import full_micro_batch
from ctpo_megatron.mcore.rehearsal.ledger import KINDS
from ctpo_megatron.mcore.rehearsal.rank import Rehearsal, Rehearsed, loss_of, rehearse
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import ModelShape
from tests.support.ranks import free_port, run_ranks
from tests.support.traffic import Call, Traffic

pytestmark = pytest.mark.dist

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
TOKENS = 512  # of a micro-batch on one rank
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "tp": ("qwen3", {"tp": 2}),
    "pp": ("qwen3", {"pp": 2}),
    "cp": ("qwen3", {"cp": 2}),
    "ep": ("qwen3_moe", {"dp": 2, "ep": 2}),
    "tp and etp": ("qwen3_moe", {"tp": 2, "etp": 2}),
}
ALONE = [("qwen3", "float32"), ("qwen3", "bfloat16"), pytest.param("qwen3_moe", "bfloat16", marks=pytest.mark.long)]


def shape_of(model: str) -> ModelShape:
    return parse_config({"model_type": model, **COMMON, **(MIXTURE if model == "qwen3_moe" else {})})


def small(model: str, layout: dict[str, int], rank: int = 0, dtype: str = "float32", tokens: int = TOKENS) -> Rehearsal:
    """A rehearsal of a tiny model with the portable layers as they are, which also the real ranks here have."""
    return Rehearsal(
        shape=shape_of(model),
        parallel=ParallelConfig(**layout),
        moe=MoeConfig(routing_replay=model == "qwen3_moe"),
        optimizer=OptimizerConfig(),
        algorithm=AlgorithmConfig(),
        recompute="none",
        dtype=dtype,
        tokens=tokens,
        micro_batches=2,
        rank=rank,
        fused=False,
    )


@cache
def together() -> tuple[list[Any], list[Any]]:
    """What two real ranks did in each layout, and what each does when it is rehearsed."""
    places = [(model, layout, free_port()) for model, layout in LAYOUTS.values()]
    real = run_ranks(2, traffic_of_steps, places)
    (rehearsed,) = run_ranks(1, rehearsals, [small(model, layout, rank) for rank in range(2) for model, layout, _ in places])
    return real, [rehearsed[: len(places)], rehearsed[len(places) :]]


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_are_those_of_two_ranks(name: str) -> None:
    """Calls and bytes of each kind; the broadcast of Python objects over pipeline stages alone is left out."""
    real, rehearsed = together()
    number = list(LAYOUTS).index(name)
    for rank in range(2):
        calls: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for each in rehearsed[rank][number].traffic:
            calls[each.kind] += each.calls
            sizes[each.kind] += each.bytes
        assert calls, "nothing was counted"
        assert (dict(calls), dict(sizes)) == real[rank][number]


@pytest.mark.parametrize(("model", "dtype"), ALONE)
def test_memory_is_what_the_allocator_gives_to_a_real_step(model: str, dtype: str) -> None:
    what = small(model, {}, dtype=dtype, tokens=2048)
    (real,) = run_ranks(1, memory_of_step, what)
    (found,) = run_ranks(1, rehearsals, [what])[0]
    assert found.weights == pytest.approx(real["weights"], rel=0.001)  # besides: the frequencies of rotation
    assert found.gradients == real["gradients"]
    assert found.optimizer == pytest.approx(real["optimizer"], rel=0.01)
    assert found.step == pytest.approx(real["step"], rel=0.1)


def test_a_large_layout_leaves_nothing_behind() -> None:
    """Rank 77 of 128, with the stand-ins for what a GPU has."""
    layout = {"tp": 2, "pp": 2, "cp": 2, "dp": 16, "ep": 4}
    found = in_own_process(replace(small("qwen3_moe", layout, rank=77), fused=True, recompute="full"), timeout_s=300)
    assert found.stage == 1
    assert {(each.group, each.size) for each in found.traffic} >= {("TP", 2), ("CP", 2), ("PP", 2), ("EP", 4), ("EDP", 16)}
    assert all(size > 0 for size in (found.weights, found.gradients, found.optimizer, found.batch, found.step))
    assert not dist.is_initialized()


def test_a_rehearsal_that_takes_too_long_or_too_much_is_told() -> None:
    what = small("qwen3", {})
    with pytest.raises(RehearsalError, match=r"within 0\.1 s"):
        in_own_process(what, timeout_s=0.1)
    with pytest.raises(RehearsalError, match="rank 0 could not be rehearsed"):
        in_own_process(what, memory=2**24)


def test_no_bridge_is_without_need() -> None:
    """Without any one of them the same rehearsal fails or finds other bytes: where it does neither, the bridge can go."""
    (found,) = run_ranks(1, without_bridges)
    whole = found.pop("nothing")
    assert isinstance(whole, int), whole
    assert [name for name, outcome in found.items() if outcome == whole] == []


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        (lambda: torch.ones(2).sum().item(), DataDependentOutputException),
        (lambda: torch.ones(2).masked_select(torch.ones(2) > 0), DynamicOutputShapeException),
    ],
)
def test_fake_tensors_have_no_values(attempt: Callable[[], object], error: type[Exception]) -> None:
    """What `HostReads` is for."""
    with FakeTensorMode(), pytest.raises(error):
        attempt()


# ---- in the ranks ----


def rehearsals(_info: RankInfo, each: list[Rehearsal]) -> list[Rehearsed]:
    return [rehearse(what) for what in each]


class RandomRank(TrainerRank):
    """A real rank without a directory of weights."""

    def _load_weights(self) -> None:
        for parameter in (p for model in self.models for p in model.parameters()):
            torch.nn.init.normal_(parameter, std=0.05)


def real_rank(info: RankInfo, what: Rehearsal) -> tuple[TrainerRank, list[Any]]:
    """The rank of `what`, after a first step, and its micro-batches."""
    rank = RandomRank(
        "", what.parallel, what.optimizer, info, device="cpu", dtype=what.dtype, seed=1, moe=what.moe, shape=what.shape
    )
    whole = full_micro_batch(what.tokens * what.parallel.cp, what.shape, what.algorithm, replay=what.moe.routing_replay)
    shards = rank.place([whole] * what.micro_batches)
    rank.train_step(shards, loss_of(what.algorithm), 1.0)
    return rank, shards


def traffic_of_steps(
    info: RankInfo, places: list[tuple[str, dict[str, int], int]]
) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Of each layout: calls and bytes by kind in one step."""
    found = []
    for model, layout, port in places:
        what = small(model, layout)
        rank, shards = real_rank(replace(info, master_port=port), what)
        with Traffic() as traffic:
            rank.train_step(shards, loss_of(what.algorithm), 1.0)
        rank.close()
        calls: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for call in traffic.calls:
            if call.name in KINDS and call.name != "broadcast_":
                calls[KINDS[call.name]] += 1
                sizes[KINDS[call.name]] += given(call)
        found.append((dict(calls), dict(sizes)))
    return found


def given(call: Call) -> int:
    """Bytes that the rank gives; `Call.sizes` has what is filled before it."""
    if "coalesced" in call.name:
        return sum(call.sizes[len(call.sizes) // 2 :])
    if call.name in ("allgather_", "_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"):
        return call.sizes[-1]
    return sum(call.sizes[1:]) if call.name == "reduce_scatter_" else sum(call.sizes)


def memory_of_step(info: RankInfo, what: Rehearsal) -> dict[str, int]:
    """Bytes of what a rank keeps, and the most that torch's allocator has given out at once in a step beyond that."""
    from torch._C._profiler import _EventType

    rank, shards = real_rank(info, what)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        rank.train_step(shards, loss_of(what.algorithm), 1.0)
    events, open_events = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while open_events:
        event = open_events.pop()
        open_events += event.children
        if event.typed[0] == _EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1].alloc_size))
    now = most = 0
    for _, size in sorted(events):
        now += size
        most = max(most, now)
    models: list[Any] = rank.models
    buffers = [buffer for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for model in models for p in model.parameters()}
    states = 0
    for part in rank.optimizer.chained_optimizers:
        states += sum(t.nbytes for state in part.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        copies = getattr(part, "shard_fp32_from_float16_groups", [])
        states += sum(t.nbytes for group in copies for t in group if t is not None)
    rank.close()
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    return {"weights": sum(parameters.values()), "gradients": gradients, "optimizer": states, "step": most}


BRIDGED = {
    "nothing": (),
    "conversion of parameters": ("_apply",),
    "objects of other ranks": ("all_gather_object",),
    "norm of gradients": ("l2_norm_impl",),
    "experts' choices": ("preprocess",),
    "shapes of pipeline stages": ("_communicate_shapes",),
    "collectives without shapes": ("WITHOUT_SHAPES",),
}


def without_bridges(_info: RankInfo) -> dict[str, int | str]:
    """Of a rehearsal that lacks each bridge: bytes at its fullest moment, or what went wrong."""
    from ctpo_megatron.mcore.host import prepare_host

    prepare_host("cpu")
    from ctpo_megatron.mcore.groups import destroy_parallel_groups
    from ctpo_megatron.mcore.rehearsal import bridge

    what = small("qwen3_moe", {"tp": 2, "pp": 2, "dp": 2, "ep": 2}, dtype="bfloat16", tokens=64)
    found: dict[str, int | str] = {}
    replace_one, without_shapes = bridge._replace, bridge.WITHOUT_SHAPES
    for bridged, names in BRIDGED.items():

        def all_others(stack: Any, owner: Any, name: str, new: Any, left: tuple[str, ...] = names) -> None:
            if name not in left:
                replace_one(stack, owner, name, new)

        bridge._replace = all_others
        bridge.WITHOUT_SHAPES = () if "WITHOUT_SHAPES" in names else without_shapes
        try:
            found[bridged] = rehearse(what).peak
        except Exception as error:  # noqa: BLE001 - what it is does not matter
            found[bridged] = repr(error)[:200]
        destroy_parallel_groups()
        if dist.is_initialized():
            dist.destroy_process_group()
    return found
