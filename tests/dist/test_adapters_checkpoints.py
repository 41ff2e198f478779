"""Checkpoints of adapters hold adapters alone, any layout goes on from them, and others' are refused. Real megatron-core."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.dist.test_checkpoint_faults import flip
from tests.support.adapters import ADAPTERS, TOLERANCE, Arrays, Found, adapters_of, merged_of, start, write_models
from tests.support.checkpoints import begin_together
from tests.support.numbers import flat
from tests.support.parity import Case, draw_samples, packs_of
from tests.support.ranks import free_port, run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory)


# where a checkpoint is from, and the layouts that go on from it; the first does as if nothing had happened
LAYOUTS: dict[str, dict[str, dict[str, int]]] = {
    "qwen2 DoRA": {"TP2": {"tp": 2}, "PP2": {"pp": 2}},
    "qwen3_moe": {"EP2": {"dp": 2, "ep": 2}, "TP2 ETP2": {"tp": 2, "etp": 2}},
}


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Found]]]:
    root = tmp_path_factory.mktemp("saved")
    return root, run_ranks(2, save_and_resume, models, root, [free_port() for _ in range(24)])


@pytest.mark.parametrize("family", LAYOUTS)
def test_checkpoints_hold_adapters_alone_and_any_layout_goes_on(saved: tuple[Path, list[dict[str, Found]]], family: str) -> None:
    root, first = saved[0] / family, saved[1][0][family]
    manifest = json.loads((root / "step_00000002" / "checkpoint.json").read_text())
    assert manifest["adapter"]["rank"] == ADAPTERS[family].rank
    stored = json.loads((root / "step_00000002" / "shards.json").read_text())
    tensors = {name for shards in stored.values() for name, _, shape, *_ in shards if shape}
    assert len(tensors) % len(first["saved"]) == 0
    assert all(".adapter." in name for name in tensors)
    for name in LAYOUTS[family]:
        for key, value in first["saved"].items():
            np.testing.assert_array_equal(first[name]["loaded"][key], value, err_msg=f"{name} {key}")
        for ours, theirs in zip(first[name]["steps"], first["uninterrupted"], strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=TOLERANCE), (name, key)
    assert first[next(iter(LAYOUTS[family]))]["steps"] == first["uninterrupted"]


@pytest.mark.parametrize("family", LAYOUTS)
def test_converting_merges_or_takes_out_what_was_saved(saved: tuple[Path, list[dict[str, Found]]], family: str) -> None:
    root, first = saved[0] / family, saved[1][0][family]
    merged = arrays_in(root / "hf")
    assert first["hf"] == len(first["merged"]) == len(merged)
    for key, value in first["merged"].items():
        np.testing.assert_allclose(merged[key], value, atol=1e-7, err_msg=key)
    written = arrays_in(root / "peft")
    assert first["peft"] == len(written) == len(first["saved"])
    for key, value in first["saved"].items():
        np.testing.assert_array_equal(written[f"base_model.model.{key}"], value)


def arrays_in(directory: Path) -> Arrays:
    from safetensors.numpy import load_file

    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def test_other_adapters_and_another_base_are_refused(saved: tuple[Path, list[dict[str, Found]]]) -> None:
    for rank in saved[1]:
        assert "alpha 6.0" in rank["refused"]["other alpha"]
        assert "model.adapter is null" in rank["refused"]["all weights"]
        assert "are not the same; set model.path" in rank["refused"]["other base"]


# ---- what runs in the ranks


class Run:
    """Starts one engine after the other on the model of one family."""

    def __init__(self, rank: RankInfo, family: str, path: Path, ports: list[int]) -> None:
        self.rank, self.adapter, self.path, self.ports = rank, ADAPTERS[family], path, ports

    def own(self) -> RankInfo:
        return replace(self.rank, master_port=self.ports.pop())

    def begin(self, layout: dict[str, int], *adapter: LoraConfig | None) -> TrainerRank:
        return start(self.own(), self.path, ParallelConfig(**layout), *(adapter or [self.adapter]))


def steps(engine: TrainerRank, count: int) -> list[dict[str, float]]:
    from ctpo_megatron.mcore.policy import supervise

    packs = packs_of(Case("grpo", True, 4), draw_samples(), engine.parallel)[engine.coords.dp_rank :: engine.parallel.dp]
    return [flat(supervise(engine, packs)) for _ in range(count)]


def save_and_resume(rank: RankInfo, models: dict[str, Path], root: Path, ports: list[int]) -> dict[str, Found]:
    found, ports = {}, list(ports)
    for family, layouts in LAYOUTS.items():
        run = Run(rank, family, models[family], ports)
        found[family] = go_on(run, layouts, root / family)
        if family == "qwen2 DoRA":
            found["refused"] = refusals(run, root / family)
    return found


def go_on(run: Run, layouts: dict[str, dict[str, int]], root: Path) -> Found:
    from ctpo_megatron.mcore.checkpoint import convert

    at, first = root / "step_00000002", next(iter(layouts.values()))
    engine = run.begin(first)
    steps(engine, 2)
    begin_together(at)
    engine.save(at)
    found: Found = {"saved": adapters_of(engine), "merged": merged_of(engine), "uninterrupted": steps(engine, 2)}
    engine.close()
    for name, layout in layouts.items():
        engine = run.begin(layout)
        engine.load(at)
        found[name] = {"loaded": adapters_of(engine), "steps": steps(engine, 2)}
        engine.close()
    for name, function in (("hf", convert.weights_to_hf), ("peft", convert.adapters_to_peft)):
        found[name] = function(run.own(), str(at), str(root / name), ParallelConfig(**first)).tensors
    return found


def refusals(run: Run, root: Path) -> dict[str, str]:
    import torch.distributed as dist

    from ctpo_megatron.errors import CheckpointError
    from ctpo_megatron.mcore.checkpoint.trainables import check_words

    moved, found = root / "moved", {}
    if run.rank.rank == 0:
        shutil.copytree(run.path, moved)
        flip(moved / "model.safetensors", 0.9)
    for name, other in {
        "other alpha": run.adapter.model_copy(update={"alpha": 3.0}),
        "all weights": None,
        "other base": run.adapter,
    }.items():
        engine = run.begin({"dp": 2}, other)
        if name == "other base":
            dist.barrier()
            engine.model_path = str(moved)
            engine._begin_adapters(1)
        with pytest.raises(CheckpointError) as refused:
            engine.load(root / "step_00000002")
        found[name] = str(refused.value)
        engine.close()
    check_words(root, *older_words())
    return found


def older_words() -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a checkpoint from before DoRA, and of a trainer without it."""
    words = {"adapter": LoraConfig().model_dump(mode="json", exclude={"path"}), "base": {"path": "x", "digest": "1"}}
    return words | {"adapter": {key: value for key, value in words["adapter"].items() if key != "use_dora"}}, words
