"""A traced optimizer step of two real ranks: spans nest, and collectives overlap in time. Real megatron-core on gloo."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.cluster.trainer.tracing import MEMORY_ENTRIES, RankTracer
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.record.heartbeat import Stages
from ctpo_megatron.record.spans import MAIN, Span
from ctpo_megatron.record.traces import Traced, lanes, trace_events
from tests.dist.test_checkpoint import engine_for, micro_batches, train
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

pytestmark = pytest.mark.dist

TOGETHER = ("allreduce", "allgather")  # none of the ranks is done before all have come
BEHIND_S = 1.0
STEP = ("optimizer step", "forward and backward", "forward", "backward", "optimizer")


def test_a_step_of_two_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(2, traced_step, write_model(tmp_path / "model", "qwen3"), tmp_path)
    waited = [seconds for *_, seconds in ranks]
    assert waited[0] > waited[1] + BEHIND_S / 4, "rank 0 waits for rank 1, and not the other way round"
    assert waited[0] > BEHIND_S / 2
    for spans, untouched, lost, _ in ranks:
        assert untouched, "what was put round methods is taken off"
        assert len(lost) == 1, "a snapshot of a GPU's memory, where there is none"
        assert "this rank has none" in lost[0]
        assert len(lanes([each for each in spans if each.track == MAIN])) == 1, "calls nest"
        names = {each.name for each in spans if each.track == MAIN}
        assert names >= {"update", *STEP}
        check_nesting(spans)
    first, second = (together(spans) for spans, *_ in ranks)
    assert first.keys() == second.keys()
    assert first
    for number, one in first.items():
        other = second[number]
        assert (one.name, one.details["bytes"]) == (other.name, other.details["bytes"])
        assert one.begin < other.end, number
        assert other.begin < one.end, number
    events = list(trace_events(0, [Traced(f"rank {rank}", spans) for rank, (spans, *_) in enumerate(ranks)]))
    assert {each["pid"] for each in events if each["ph"] == "X"} == {1, 2}
    check_profile(tmp_path / "profile_0.json.gz")


def check_profile(path: Path) -> None:
    """It has the operators of a training step, forward and backward, and what they allocate."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = {each.get("name") for each in events}
    assert {"aten::mm", "aten::embedding_dense_backward", "gloo:all_reduce"} <= names
    assert any(str(name).startswith("autograd::engine::evaluate_function") for name in names)
    allocated = [each["args"]["Bytes"] for each in events if each.get("name") == "[memory]"]
    assert any(size > 0 for size in allocated)
    assert any(size < 0 for size in allocated), "what is freed"


def record_memory(engine: TrainerRank, path: Path) -> None:
    """torch's recorder of a GPU's memory is begun, written and ended, with arguments that it has. There is no GPU to record."""
    memory = torch.cuda.memory
    with (
        patch.object(torch.cuda, "is_available", return_value=True),
        patch.object(memory, "_record_memory_history", autospec=True) as record,
        patch.object(memory, "_dump_snapshot", autospec=True) as dump,
    ):
        trace = RankTracer(engine, Stages(), None, path).end()
    assert trace.lost == []
    assert [each.kwargs for each in record.call_args_list] == [{"max_entries": MEMORY_ENTRIES}, {"enabled": None}]
    dump.assert_called_once_with(str(path))


def check_nesting(spans: list[Span]) -> None:
    """Passes lie in the step that they belong to, and the step in the call."""
    by_name = {name: [each for each in spans if each.name == name] for name in ("update", *STEP)}
    for inner, outer in (
        ("forward", STEP[1]),
        ("backward", STEP[1]),
        (STEP[1], STEP[0]),
        ("optimizer", STEP[0]),
        (STEP[0], "update"),
    ):
        for each in by_name[inner]:
            assert any(around.begin <= each.begin and each.end <= around.end for around in by_name[outer]), (inner, outer)


def together(spans: list[Span]) -> dict[tuple[Any, Any], Span]:
    """The collectives of groups of two ranks that none leaves before all are in, by their group and number."""
    found = [each for each in spans if each.name in TOGETHER and each.details["ranks"] == 2]
    return {(each.details["group"], each.details["number"]): each for each in found}


def traced_step(rank: RankInfo, model: Path, directory: Path) -> tuple[list[Span], bool, list[str], float]:
    engine = engine_for(rank, model, {"dp": 2})
    train(engine, 1)  # what is done once is done
    methods = {name: getattr(dist.ProcessGroup, name) for name in ("allreduce", "broadcast")} | {"wait": dist.Work.wait}
    stages = Stages()
    profile = directory / "profile_0.json.gz" if rank.rank == 0 else None
    dist.barrier()
    tracer = RankTracer(engine, stages, profile, directory / "memory.pickle")
    with stages("update", step=2):
        train(engine, 1)
    trace = tracer.end()
    now = {name: getattr(dist.ProcessGroup, name) for name in ("allreduce", "broadcast")} | {"wait": dist.Work.wait}
    untouched = now == methods and "train_step" not in vars(engine) and "enter" not in vars(stages)
    record_memory(engine, directory / "of_a_gpu.pickle")
    waited_s = waited_for_a_slow_rank(engine)
    engine.close()
    return trace.spans, untouched, trace.lost, waited_s


def waited_for_a_slow_rank(engine: TrainerRank) -> float:
    """The seconds for which this rank waits in a step in which rank 1 takes BEHIND_S longer."""
    mine = engine.place(micro_batches()[2 * engine.coords.dp_rank :][:2])

    def share(logp: Any, pack: Any, _scan: Any) -> Any:
        time.sleep(BEHIND_S / len(mine) if engine.rank.rank == 1 else 0.0)
        return -torch.where(pack.tokens.mask, logp, 0.0).sum() / 80, Stats()

    dist.barrier()
    engine.waited_s()
    engine.train_step(mine, share, 1.0)
    found = engine.waited_s()
    assert engine.waited_s() == 0.0
    return found
