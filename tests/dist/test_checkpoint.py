"""A run that is saved and resumed goes on as if it had never stopped. Real megatron-core on gloo."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.checkpoints import PART, begin_together, newest_name
from tests.support.families import MODELS
from tests.support.numbers import flat
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=3, weight_decay=0.1)
STEPS = 3  # trained after resuming

# (family, number format, layout that saves, layouts that go on)
Case = tuple[str, str, dict[str, Any], list[dict[str, Any]]]
CASES: list[Case] = [
    ("qwen3", "float32", {"tp": 2}, [{"tp": 2}, {"pp": 2}]),
    ("qwen3_moe", "float32", {"dp": 2, "ep": 2}, [{"dp": 2, "ep": 2}, {"dp": 2}]),
    ("qwen3", "bfloat16", {"dp": 2}, [{"dp": 2}]),  # the optimizer keeps the weights in float32
]
MORE_CASES: list[Case] = [
    ("qwen3", "float32", {"dp": 2}, [{"dp": 2}, {"cp": 2}, {"pp": 2}]),
    ("qwen3", "float32", {"pp": 2}, [{"pp": 2}, {"dp": 2}]),  # tied embeddings: the last stage holds a copy
    ("qwen3_moe", "float32", {"tp": 2}, [{"cp": 2, "ep": 2}, {"tp": 2, "etp": 2}]),
    ("deepseek_v3", "float32", {"dp": 2, "ep": 2}, [{"dp": 2, "ep": 2}, {"tp": 2}, {"pp": 2}]),
    ("qwen3", "float32", {"pp": 2, "vpp": 2}, [{"pp": 2, "vpp": 2}, {"pp": 2}, {"tp": 2}]),  # two chunks of the model per rank
    # gradients reduced in several buckets, each of which is spread over the ranks by itself
    ("qwen3", "float32", {"dp": 2, "overlap_grad_reduce": True}, [{"dp": 2, "overlap_grad_reduce": True}, {"dp": 2}, {"pp": 2}]),
    ("qwen3", "float32", {"dp": 2}, [{"cp": 2, "overlap_grad_reduce": True}]),
    ("qwen3_moe", "bfloat16", {"tp": 2, "ep": 2}, [{"tp": 2, "ep": 2}]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("qwen3", "qwen2", "qwen3_moe", "deepseek_v3")
    return {family: write_model(tmp_path_factory.mktemp(family), family, 4, MODELS[family]) for family in families}


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.long)], ids=["some", "more"])
def test_resumed_run_equals_uninterrupted_run(models: dict[str, Path], tmp_path: Path, cases: list[Case]) -> None:
    ports = [free_port() for _, _, _, layouts in cases for _ in range(1 + len(layouts))]
    ranks = run_ranks(2, save_and_resume, models, cases, tmp_path, ports)
    for case, (family, dtype, saved, layouts) in enumerate(cases):
        for number, layout in enumerate(layouts):
            for rank in ranks:
                uninterrupted, resumed = rank[case]["uninterrupted"], rank[case]["resumed"][number]
                where = f"{family} {dtype} {saved} -> {layout}"
                assert resumed["part"] == PART, where
                assert_equal(resumed["loaded"], rank[case]["saved"], where)
                if layout == saved:
                    assert resumed["steps"] == uninterrupted["steps"], where
                    assert resumed["draws"] == uninterrupted["draws"], where
                    assert_equal(resumed["weights"], uninterrupted["weights"], where)
                else:
                    for ours, theirs in zip(resumed["steps"], uninterrupted["steps"], strict=True):
                        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), where
        assert ranks[0][case]["moved"] > 1e-3


def test_fewer_ranks_go_on(models: dict[str, Path], tmp_path: Path) -> None:
    """Four ranks save, two go on; the random states are then those of the seed."""
    layouts = {"qwen3": {"tp": 2, "pp": 2}, "qwen3_moe": {"pp": 2, "dp": 2, "ep": 2}}
    ports = {family: free_port() for family in layouts}
    expected = run_ranks(4, save_and_go_on, models, layouts, tmp_path, ports)[0]
    for rank in run_ranks(2, resume, models, {family: {"tp": 2} for family in layouts}, tmp_path, ports):
        for family, found in rank.items():
            assert found["part"] == PART, family
            for ours, theirs in zip(found["steps"], expected[family], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), family


def test_a_checkpoint_that_cannot_be_used_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for errors in run_ranks(2, misuse, models, tmp_path, [free_port(), free_port()]):
        assert "does not exist" in errors["absent"]
        assert "checkpoint.json is missing" in errors["unfinished"]
        assert "call begin_checkpoint first" in errors["not begun"]
        assert "cannot be read into this model" in errors["other model"]
        assert errors["survivor"] == "step_00000001"


def test_megatron_still_needs_what_optimizer_state_bridges(models: dict[str, Path]) -> None:
    found = run_ranks(2, unbridged, models["qwen3"])[1]  # the last stage
    assert found["begin_state"] == "AssertionError"
    assert found["misplaced without padding_counted"]
    assert not found["misplaced with padding_counted"]
    assert found["steps_kept"] == "KeyError"
    assert found["steps after megatron's load"] == 1
    assert found["steps after separate_steps"] == found["parameters"] > 1


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=f"{where}, {name}")


# ---- what runs in the ranks


def save_and_resume(
    rank: RankInfo, models: dict[str, Path], cases: list[Case], root: Path, ports: list[int]
) -> list[dict[str, Any]]:
    import ctpo_megatron.mcore.model.build as build

    build.OVERLAPPED_BUCKET = 20_000  # several of a tiny model
    ports = list(ports)

    def start(family: str, layout: dict[str, int], dtype: str) -> TrainerRank:
        return engine_for(replace(rank, master_port=ports.pop()), models[family], layout, dtype)

    results = []
    for number, (family, dtype, saved, layouts) in enumerate(cases):
        directory = root / str(number) / "step_00000002"
        engine = start(family, saved, dtype)
        before = weights(engine)
        train(engine, 2)
        begin_together(directory)
        engine.save(directory)
        result: dict[str, Any] = {"saved": weights(engine), "resumed": []}
        result["uninterrupted"] = {"draws": draws(), "steps": train(engine, STEPS), "weights": weights(engine)}
        result["moved"] = max((float(np.abs(result["saved"][name] - before[name]).max()) for name in before), default=1.0)
        engine.close()
        for layout in layouts:
            engine = start(family, layout, dtype)
            if layout != saved:
                train(engine, 1)  # what is loaded may also replace something
            engine.load(directory)
            resumed: dict[str, Any] = {"draws": draws(), "loaded": weights(engine), "part": (directory / "run.json").read_text()}
            result["resumed"].append(resumed | {"steps": train(engine, STEPS), "weights": weights(engine)})
            engine.close()
        results.append(result)
    return results


def save_and_go_on(
    rank: RankInfo, models: dict[str, Path], layouts: dict[str, dict[str, int]], root: Path, ports: dict[str, int]
) -> dict[str, list[dict[str, float]]]:
    found = {}
    for family, layout in layouts.items():
        engine = engine_for(replace(rank, master_port=ports[family]), models[family], layout)
        train(engine, 2)
        begin_together(root / family / "step_00000002")
        engine.save(root / family / "step_00000002", background=True)
        found[family] = train(engine, STEPS)
        engine.close()
    return found


def resume(
    rank: RankInfo, models: dict[str, Path], layouts: dict[str, dict[str, int]], root: Path, ports: dict[str, int]
) -> dict[str, dict[str, Any]]:
    found = {}
    for family, layout in layouts.items():
        engine = engine_for(replace(rank, master_port=ports[family]), models[family], layout)
        directory = root / family / "step_00000002"
        engine.load(directory)
        found[family] = {"part": (directory / "run.json").read_text(), "steps": train(engine, STEPS)}
        engine.close()
    return found


def misuse(rank: RankInfo, models: dict[str, Path], root: Path, ports: list[int]) -> dict[str, str]:
    import torch.distributed as dist

    engine = engine_for(replace(rank, master_port=ports[0]), models["qwen3"], {"dp": 2})
    errors = {}

    def refused(name: str, action: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            action()
        errors[name] = str(caught.value)
        dist.barrier()

    good = root / "step_00000001"
    begin_together(good)
    engine.save(good)
    refused("absent", lambda: engine.load(root / "step_00000009"))
    refused("not begun", lambda: engine.save(root / "step_00000002"))
    if rank.rank == 0:
        (root / "step_00000003.tmp").mkdir()
        (root / "step_00000004").mkdir()
    dist.barrier()
    refused("unfinished", lambda: engine.load(root / "step_00000004"))
    errors["survivor"] = newest_name(root)
    engine.close()

    engine = engine_for(replace(rank, master_port=ports[1]), models["qwen2"], {"dp": 2})
    refused("other model", lambda: engine.load(good))
    engine.close()
    return errors


def unbridged(rank: RankInfo, path: Path) -> dict[str, Any]:
    """What megatron does without each of the bridges. Tied embeddings over two stages make two buckets."""
    engine = engine_for(rank, path, {"pp": 2})
    from ctpo_megatron.mcore.checkpoint import optimizer_state
    from ctpo_megatron.mcore.host import megatron_region
    from ctpo_megatron.mcore.optimizer import begin_state

    optimizer = engine.optimizer
    part = optimizer.chained_optimizers[0]
    found: dict[str, Any] = {}
    with megatron_region(engine.device):
        optimizer.chained_optimizers[0].optimizer.state.clear()
        found["begin_state"] = failure(optimizer.state_dict)
        begin_state(optimizer)
    train(engine, 1)
    with megatron_region(engine.device):
        found["misplaced without padding_counted"] = misplaced(engine, contextlib.nullcontext())
        found["misplaced with padding_counted"] = misplaced(engine, optimizer_state.padding_counted(optimizer))

        model = {"model0": engine.models[0].module.sharded_state_dict()}
        described = optimizer_state.optimizer_shards(optimizer, model, {}, loading=False)
        described["param_state"] = {
            number: {key: shard.data for key, shard in tensors.items()} for number, tensors in described["param_state"].items()
        }
        found["steps_kept"] = failure(lambda: optimizer.load_state_dict(described))
        with optimizer_state.steps_kept(optimizer):
            optimizer.load_state_dict(described)
        states = part.optimizer.state.values()
        found["parameters"] = len(states)
        found["steps after megatron's load"] = len({id(state["step"]) for state in states})
        optimizer_state.separate_steps(optimizer)
        found["steps after separate_steps"] = len({id(state["step"]) for state in states})
    engine.close()
    return found


def misplaced(engine: TrainerRank, context: Any) -> list[str]:
    """Parameters that the optimizer's description gives other numbers than they have."""
    from ctpo_megatron.mcore.checkpoint.optimizer_state import SHARDING

    model = {"model0": engine.models[0].module.sharded_state_dict()}
    with context:
        described = engine.optimizer.sharded_state_dict(model, metadata=SHARDING)
    found = []
    for tensors in described["param_state"].values():
        stored = tensors["param"]
        name = stored.key.removeprefix("optimizer.state.param.")
        same = [
            shard.data
            for shard in model["model0"].values()
            if getattr(shard, "key", None) == name and getattr(shard, "global_offset", 0) == getattr(stored, "global_offset", 0)
        ]
        if not any(torch.equal(stored.data, data) for data in same):
            found.append(name)
    return found


def failure(action: Any) -> str:
    with pytest.raises(Exception) as caught:
        action()
    return caught.type.__name__


def engine_for(rank: RankInfo, path: Path, layout: dict[str, int], dtype: str = "float32") -> TrainerRank:
    return TrainerRank(str(path), ParallelConfig(**layout), OPTIMIZER, rank, device="cpu", dtype=dtype, seed=1)


def train(engine: TrainerRank, steps: int) -> list[dict[str, float]]:
    per_rank = 4 // engine.parallel.dp
    mine = engine.place(micro_batches()[engine.coords.dp_rank * per_rank :][:per_rank])

    def share(logp: Any, pack: Any, _scan: Any) -> Any:
        return -torch.where(pack.tokens.mask, logp, 0.0).sum() / 80, Stats()

    return [flat(engine.train_step(mine, share, 1.0)) for _ in range(steps)]


def weights(engine: TrainerRank) -> dict[str, np.ndarray]:
    """Whole weights on rank 0, nothing elsewhere."""
    return {name: tensor.float().numpy() for bucket in engine.stream(64 * 1024, to=0) for name, tensor in bucket}


def draws() -> list[float]:
    """One number from each random state."""
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        device = torch.cuda.get_rng_state().float().mean().item()
    return [random.random(), float(np.random.random()), torch.rand(1).item(), device]
