"""Adapters: every layout is one rank, one rank is the package peft, and nothing but A and B moves. Real megatron-core on gloo."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctpo_megatron.config.adapter import LoraConfig, Target
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.dist.test_checkpoint_faults import flip
from tests.support.checkpoints import begin_together
from tests.support.families import MODELS
from tests.support.numbers import flat
from tests.support.parity import Case, draw_samples, packs_of
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
OPTIMIZER = OptimizerConfig(lr=2e-2, eps=0.1, weight_decay=0.1, clip_grad=1e3)
ATTENTION: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTERS = {
    "qwen3": LoraConfig(rank=3, alpha=12.0),  # tied embeddings, norms of queries and keys
    "qwen2": LoraConfig(rank=4, alpha=8.0, use_rslora=True, targets=("q_proj", "v_proj", "up_proj", "down_proj")),  # biases
    "qwen3_moe": LoraConfig(rank=2, alpha=8.0, targets=ATTENTION),
}
LAYERS = 4
TWO_RANKS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "TP2": ({"tp": 2}, ("qwen3",)),
    "VPP": ({"pp": 2, "vpp": 2}, ("qwen2",)),
    "CP2": ({"cp": 2}, ("qwen2",)),
    "EP2": ({"dp": 2, "ep": 2}, ("qwen3_moe",)),
}
FOUR_RANKS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "TP2 CP2": ({"tp": 2, "cp": 2}, ("qwen3",)),
    "TP2 PP2": ({"tp": 2, "pp": 2}, ("qwen3_moe",)),
}
FAULTS = [
    ("TP2", "qwen3", "parts of a gradient are not added up"),
    ("CP2", "qwen2", "queries not grouped with their keys"),
]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family, LAYERS, MODELS[family]) for family in ADAPTERS}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run_ranks(1, one_rank, models, tmp_path_factory.mktemp("peft"))[0]


@pytest.fixture(scope="module")
def two(models: dict[str, Path]) -> list[dict[tuple[str, str], Found]]:
    return run_ranks(2, layouts, TWO_RANKS, models, [free_port() for _ in range(12)])


@pytest.fixture(scope="module")
def four(models: dict[str, Path]) -> list[dict[tuple[str, str], Found]]:
    return run_ranks(4, layouts, FOUR_RANKS, models, [free_port() for _ in range(12)])


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, (_, some) in TWO_RANKS.items() for family in some])
def test_two_ranks_are_one(two: list[dict], alone: dict[str, Found], name: str, family: str) -> None:
    assert_same(two, alone, name, family)


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, (_, some) in FOUR_RANKS.items() for family in some])
def test_four_ranks_are_one(four: list[dict], alone: dict[str, Found], name: str, family: str) -> None:
    assert_same(four, alone, name, family)


def assert_same(ranks: list[dict], alone: dict[str, Found], name: str, family: str) -> None:
    found, expected = ranks[0][name, family], alone[family]
    assert all(rank[name, family]["steps"] == found["steps"] for rank in ranks)
    for key, value in expected["drawn"].items():  # drawn alike, bit for bit
        np.testing.assert_array_equal(found["drawn"][key], value, err_msg=key)
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=TOLERANCE), key
    for kind in ("adapters", "merged"):
        for key, value in expected[kind].items():
            np.testing.assert_allclose(found[kind][key], value, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize(("name", "family", "fault"), FAULTS)
def test_a_planted_fault_is_found(two: list[dict], alone: dict[str, Found], name: str, family: str, fault: str) -> None:
    planted = [{(name, family): rank[name, fault]} for rank in two]
    with pytest.raises(AssertionError):
        assert_same(planted, alone, name, family)


@pytest.mark.parametrize("family", ADAPTERS)
def test_only_adapters_move(alone: dict[str, Found], family: str) -> None:
    found = alone[family]
    assert found["base moved"] == 0.0
    assert found["optimizer"] == found["trainable"] == sum(value.size for value in found["adapters"].values())
    moved = {key: np.abs(found["adapters"][key] - value).max() for key, value in found["before"].items()}
    assert min(moved.values()) > 10 * TOLERANCE, min(moved, key=lambda key: moved[key])
    targets = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in moved}
    assert targets == set(ADAPTERS[family].targets)


@pytest.mark.parametrize("family", ADAPTERS)
def test_the_reference_policy_is_the_model_without_its_adapters(alone: dict[str, Found], family: str) -> None:
    found = alone[family]
    np.testing.assert_array_equal(found["reference"], found["base"])
    assert np.abs(found["policy"] - found["base"]).max() > 1e-3
    np.testing.assert_array_equal(found["policy again"], found["policy"])


@pytest.mark.parametrize("family", [family for family in ADAPTERS if family != "qwen3_moe"])
def test_one_rank_is_peft(alone: dict[str, Found], models: dict[str, Path], family: str) -> None:
    """Log-probs, loss, every gradient and the merged weights, from the files that we write; and the files that peft writes."""
    found = alone[family]
    model = of_peft(models[family], found["directory"])
    logps, loss = log_probs(model)
    np.testing.assert_allclose(found["logp"], logps.detach().numpy(), atol=2e-5)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == len(found["gradients"]) == 2 * LAYERS * len(ADAPTERS[family].targets)
    for name, gradient in gradients.items():
        key = name.removeprefix("base_model.model.").replace(".default", "")
        np.testing.assert_allclose(found["gradients"][key], gradient, atol=1e-5, err_msg=key)
    merged = model.merge_and_unload().state_dict()
    for key, value in found["merged before"].items():
        np.testing.assert_allclose(value, merged[key].numpy(), atol=1e-6, err_msg=key)


def test_an_adapter_of_peft_is_taken(models: dict[str, Path], tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(models["qwen2"], dtype=torch.float32)
    theirs = peft.LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules=["down_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, theirs)
    model.save_pretrained(tmp_path)
    adapter = LoraConfig(rank=4, alpha=32.0, use_rslora=True, targets=("k_proj", "down_proj"), path=str(tmp_path))
    found = run_ranks(1, with_peft, models["qwen2"], adapter)[0]
    np.testing.assert_allclose(found["logp"], log_probs(model)[0].detach().numpy(), atol=2e-5)
    assert "model.adapter.alpha is 4" in found["other alpha"]
    assert "model.adapter.targets is" in found["other targets"]


def test_checkpoints_hold_adapters_alone_and_any_layout_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ranks = run_ranks(2, save_and_resume, models, tmp_path, [free_port() for _ in range(12)])
    first = ranks[0]
    manifest = json.loads((tmp_path / "step_00000002" / "checkpoint.json").read_text())
    assert manifest["adapter"]["rank"] == 3
    stored = json.loads((tmp_path / "step_00000002" / "shards.json").read_text())
    tensors = {name for shards in stored.values() for name, _, shape, *_ in shards if shape}
    assert tensors
    assert all(".adapter." in name for name in tensors)
    for name in ("TP2", "PP2"):
        for key, value in first["saved"].items():
            np.testing.assert_array_equal(first[name]["loaded"][key], value, err_msg=f"{name} {key}")
        for ours, theirs in zip(first[name]["steps"], first["uninterrupted"], strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=TOLERANCE), (name, key)
    assert first["TP2"]["steps"] == first["uninterrupted"]
    for rank in ranks:
        assert "alpha 12.0" in rank["other alpha"]
        assert "model.adapter is null" in rank["all weights"]
        assert "are not the same; set model.path" in rank["other base"]
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    assert first["hf"] == len(first["merged"]) == len(merged)
    for key, value in first["merged"].items():
        np.testing.assert_allclose(merged[key].numpy(), value, atol=1e-7, err_msg=key)
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert first["peft"] == len(written) == len(first["saved"])
    for key, value in first["saved"].items():
        np.testing.assert_array_equal(written[f"base_model.model.{key}"].numpy(), value)


def of_peft(base: Path, directory: Path) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)


def log_probs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all labels of the packs, one after the other; and their masked mean negative log-likelihood."""
    packs, pieces = micro_batches(), []
    for pack in packs:
        bounds = pack.sequences.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            logits = model(input_ids=pack.tokens.input_ids[None, start:end]).logits[0]
            pieces.append(logits.log_softmax(-1).gather(-1, pack.tokens.labels[start:end, None]).squeeze(-1))
    mask, logp = torch.cat([pack.tokens.mask for pack in packs]), torch.cat(pieces)
    return logp, -logp[mask].sum() / int(mask.sum())


# ---- what runs in the ranks


def start(rank: RankInfo, path: Path, parallel: ParallelConfig, adapter: LoraConfig, **options: Any) -> TrainerRank:
    return TrainerRank(str(path), parallel, OPTIMIZER, at_own_port(rank), device="cpu", seed=1, adapter=adapter, **options)


def adapters_of(engine: TrainerRank) -> dict[str, NDArray[np.float32]]:
    from ctpo_megatron.mcore.hf.stream import gather_adapters

    return {name: tensor.numpy().copy() for name, tensor in gather_adapters(engine.models, engine.shape, engine.adapter)}


def merged_of(engine: TrainerRank) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.numpy().copy() for bucket in engine.stream(1 << 20, to=0) for name, tensor in bucket}


def stir(engine: TrainerRank) -> None:
    """B is no longer zero, and the same at every layout."""
    from ctpo_megatron.mcore.hf.adapters import own_piece
    from ctpo_megatron.mcore.model.lora import adapter_pairs

    with torch.no_grad():
        for pair in adapter_pairs(engine.models):
            seed = zlib.crc32(pair.adapted.b.name.encode())
            drawn = torch.randn(pair.adapted.b.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
            pair.b.copy_(own_piece(drawn, pair.adapted.b))


def train(engine: TrainerRank, family: str) -> Found:
    """Two optimizer steps, and what they began with."""
    from ctpo_megatron.mcore.policy import update_policy

    found: Found = {"drawn": adapters_of(engine)}
    stir(engine)
    found["before"] = adapters_of(engine)
    case = Case("grpo", True, 4, replay=False)
    packs = packs_of(case, draw_samples(), engine.parallel)[engine.coords.dp_rank :: engine.parallel.dp]
    options = {"algorithm": AlgorithmConfig(anchor="old"), "temperature": 0.7, "drift": DriftBounds(), "version": 0}
    found["steps"] = [flat(update_policy(engine, [packs], **options)) for _ in range(2)]
    return found | {"adapters": adapters_of(engine), "merged": merged_of(engine)}


def layouts(
    rank: RankInfo, some: dict[str, tuple[dict[str, int], tuple[str, ...]]], models: dict[str, Path], ports: list[int]
) -> dict[tuple[str, str], Found]:
    ports, found = list(ports), {}

    def run(name: str, family: str, key: str, change: Callable[[TrainerRank], Any] = lambda _engine: None) -> None:
        parallel = ParallelConfig(**some[name][0])
        engine = start(replace(rank, master_port=ports.pop()), models[family], parallel, ADAPTERS[family])
        change(engine)
        found[name, key] = train(engine, family)
        engine.close()

    for name, (_, families) in some.items():
        for family in families:
            run(name, family, family)
    for (name, family, fault), plant in zip(FAULTS, (unmark, ungroup), strict=True):
        if name in some:
            run(name, family, fault, plant)
    return found


def unmark(engine: TrainerRank) -> None:
    from ctpo_megatron.mcore.model.lora import adapter_pairs

    for pair in adapter_pairs(engine.models):
        pair.a.sequence_parallel = False


def ungroup(engine: TrainerRank) -> None:
    from ctpo_megatron.mcore.model.lora import linear_adapters

    for adapter in linear_adapters(engine.models):
        adapter.groups = 0


def one_rank(rank: RankInfo, models: dict[str, Path], root: Path) -> dict[str, Found]:
    return {family: one_family(rank, path, family, root / family) for family, path in models.items()}


def one_family(rank: RankInfo, path: Path, family: str, directory: Path) -> Found:
    from ctpo_megatron.mcore.hf.load import keyed_tensors

    def base(engine: TrainerRank) -> dict[str, torch.Tensor]:
        return {key: p.detach().clone() for key, p in keyed_tensors(engine.models[0], engine.shape, engine.coords)}

    def logp(engine: TrainerRank) -> NDArray[np.float32]:
        return torch.cat(engine.logp(engine.place(micro_batches()), 1.0)).numpy()

    engine = start(rank, path, ParallelConfig(), ADAPTERS[family])
    before, untouched = base(engine), logp(engine)  # B is 0
    found = train(engine, family)
    found["base moved"] = max(float((p - before[key]).abs().max()) for key, p in base(engine).items())
    states = [s for part in engine.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    found["optimizer"] = sum(state["exp_avg"].numel() for state in states)
    found["trainable"] = sum(p.numel() for p in engine.models[0].parameters() if p.requires_grad)
    found |= {"base": untouched, "policy": logp(engine)}
    with engine.using(engine.reference()):
        found["reference"] = logp(engine)
    found["policy again"] = logp(engine)
    stir(engine)
    engine.save_adapter(directory)
    found |= {"directory": directory, "merged before": merged_of(engine), "logp": logp(engine)} | likelihood(engine)
    engine.close()
    return found


def likelihood(engine: TrainerRank) -> Found:
    """Loss and gradients of the masked mean negative log-likelihood."""
    from ctpo_megatron.algorithms import Stats
    from ctpo_megatron.mcore.host import megatron_region
    from ctpo_megatron.mcore.model.lora import adapter_pairs
    from ctpo_megatron.record.values import scalar

    packs = engine.place(micro_batches())
    count = sum(int(pack.tokens.mask.sum()) for pack in packs)

    def share(logp: torch.Tensor, mb: Any, _scan: Any) -> Any:
        return -torch.where(mb.tokens.mask, logp, 0.0).sum() / count, Stats()

    with megatron_region(engine.device):
        values = engine._stepper.forward_backward(packs, share, 1.0)
    gradients = {}
    for pair in adapter_pairs(engine.models):
        gradients[pair.adapted.a.name] = pair.a.main_grad.numpy().copy()
        gradients[pair.adapted.b.name] = pair.b.main_grad.numpy().copy()
    return {"loss": scalar(values["loss"]), "gradients": gradients}


def save_and_resume(rank: RankInfo, models: dict[str, Path], root: Path, ports: list[int]) -> Found:
    from ctpo_megatron.errors import CheckpointError
    from ctpo_megatron.mcore.checkpoint import convert
    from ctpo_megatron.mcore.policy import supervise

    ports, adapter, path, at = list(ports), ADAPTERS["qwen3"], models["qwen3"], root / "step_00000002"

    def begin(layout: dict[str, int], adapter: LoraConfig | None = adapter, path: Path = path) -> TrainerRank:
        return start(replace(rank, master_port=ports.pop()), path, ParallelConfig(**layout), adapter)

    def steps(engine: TrainerRank, count: int) -> list[dict[str, float]]:
        packs = packs_of(Case("grpo", True, 4), draw_samples(), engine.parallel)[engine.coords.dp_rank :: engine.parallel.dp]
        return [flat(supervise(engine, packs)) for _ in range(count)]

    engine = begin({"tp": 2})
    steps(engine, 2)
    begin_together(at)
    engine.save(at)
    found: Found = {"saved": adapters_of(engine), "merged": merged_of(engine), "uninterrupted": steps(engine, 2)}
    engine.close()
    for name, layout in (("TP2", {"tp": 2}), ("PP2", {"pp": 2})):
        engine = begin(layout)
        engine.load(at)
        found[name] = {"loaded": adapters_of(engine), "steps": steps(engine, 2)}
        engine.close()
    others = {"other alpha": (adapter.model_copy(update={"alpha": 3.0}), path), "all weights": (None, path)}
    if rank.rank == 0:
        moved = root / "moved"
        shutil.copytree(path, moved)
        flip(moved / "model.safetensors", 0.9)
    others["other base"] = (adapter, root / "moved")
    for name, (other, where) in others.items():
        engine = begin({"dp": 2}, other, path)
        if where != path:
            import torch.distributed as dist

            dist.barrier()
            engine.model_path = str(where)
            engine._begin_adapters(1)
        with pytest.raises(CheckpointError) as refused:
            engine.load(at)
        found[name] = str(refused.value)
        engine.close()
    for name, function in (("hf", convert.weights_to_hf), ("peft", convert.adapters_to_peft)):
        own = replace(rank, master_port=ports.pop())
        found[name] = function(own, str(at), str(root / name), ParallelConfig(tp=2)).tensors
    return found


def with_peft(rank: RankInfo, path: Path, adapter: LoraConfig) -> Found:
    from ctpo_megatron.errors import ModelError

    found: Found = {}
    engine = start(rank, path, ParallelConfig(), adapter)
    found["logp"] = torch.cat(engine.logp(engine.place(micro_batches()), 1.0)).numpy()
    for name, change in (("alpha", {"alpha": 4.0}), ("targets", {"targets": ("q_proj",)})):
        with patch.object(engine, "adapter", adapter.model_copy(update=change)), pytest.raises(ModelError) as refused:
            engine._begin_adapters(1)
        found[f"other {name}"] = str(refused.value)
    engine.close()
    assert math.isfinite(found["logp"].sum())
    return found
