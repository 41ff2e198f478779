"""Hugging Face weights in and out: the same bytes at every layout, and models that transformers loads. Real megatron-core."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import ModelError
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import read_hf_config
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import FAMILIES, VOCAB, write_model

pytestmark = pytest.mark.dist

BUCKET_BYTES = 20_000  # some tensors are larger, most are smaller
SHARD_BYTES = 100_000

TWO_RANKS = [
    ("qwen3", {"tp": 2}),  # tied embeddings
    ("qwen3", {"pp": 2}),
    ("qwen2", {"tp": 2}),  # biases
    ("qwen2", {"pp": 2}),
    ("llama", {"tp": 2}),
    ("qwen3_moe", {"dp": 2, "ep": 2}),
    ("qwen3_moe", {"tp": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2}),
]
FOUR_RANKS = [("qwen3", {"tp": 2, "pp": 2}), ("llama", {"tp": 2, "pp": 2}), ("qwen3_moe", {"tp": 2, "pp": 2, "ep": 2})]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize(("world_size", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
def test_export_is_what_was_loaded(
    world_size: int, cases: list[tuple[str, dict[str, int]]], models: dict[str, Path], tmp_path: Path
) -> None:
    ports = [(free_port(), free_port()) for _ in cases]
    ranks = run_ranks(world_size, round_trips, cases, models, tmp_path, ports)
    for number, (family, layout) in enumerate(cases):
        where = f"{family} {layout}"
        stored = tensors_of(models[family])
        assert_same(ranks[0][number]["exported"], stored, where)
        assert_same(tensors_of(tmp_path / str(number)), stored, where)
        check_buckets(ranks[0][number]["buckets"])
        for other in ranks[1:]:
            assert other[number]["exported"] == {}, where
        check_streams([rank[number]["stream"] for rank in ranks], stored, layout, where)
        check_stages([rank[number]["stages"] for rank in ranks], stored, layout, where)
        assert same_logits(models[family], tmp_path / str(number)), where


def test_saved_directory_is_complete(models: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models["qwen2"], source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("stays behind")
    run_ranks(1, save_bfloat16, source, tmp_path / "saved")
    saved = tmp_path / "saved"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert {file.name for file in saved.glob("*.safetensors")} == {"model.safetensors"}
    assert not (saved / "model.safetensors.index.json").exists()
    assert (saved / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (saved / "generation_config.json").is_file()
    assert (saved / "tokenizer.json").is_file()
    assert not (saved / "notes.txt").exists()
    assert not (saved / "stale").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("saved")] == ["saved"]
    assert read_hf_config(saved) == replace(read_hf_config(source), dtype="bfloat16")


def test_weights_that_do_not_fit_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = {}
    for name in ("lacking", "extra", "shape", "tolerated"):
        bad[name] = tmp_path / name
        shutil.copytree(models["qwen3"], bad[name])
        weights = load_file(bad[name] / "model.safetensors")
        if name == "lacking":
            del weights["model.layers.1.mlp.up_proj.weight"]
        elif name == "extra":
            weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
        elif name == "shape":
            weights["model.norm.weight"] = torch.zeros(3)
        else:  # the tied head a second time
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, bad[name] / "model.safetensors")
    (errors,) = run_ranks(1, load_all, bad, [free_port() for _ in bad])
    assert "lacks" in errors["lacking"]
    assert "model.layers.1.mlp.up_proj.weight" in errors["lacking"]
    assert "no place for" in errors["extra"]
    assert "model.layers.2.mlp.up_proj.weight" in errors["extra"]
    assert "model.norm.weight has shape [3]; config.json asks for [64]" in errors["shape"]
    assert errors["tolerated"] == ""


def test_transformer_engine_names_lead_to_the_same_table() -> None:
    (found,) = run_ranks(1, translate_names)
    local, whole = "decoder.layers.1.self_attention", "decoder.layers.7.self_attention"
    assert found == {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.4.input_layernorm.weight",
        f"{local}.linear_q_up_proj.layer_norm_weight": f"{whole}.q_layernorm.weight",
        f"{local}.linear_kv_up_proj.layer_norm_weight": f"{whole}.kv_layernorm.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": "decoder.layers.7.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight3": "decoder.layers.7.mlp.experts.local_experts.11.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.linear_fc2.weight10": "decoder.layers.4.mlp.experts.local_experts.18.linear_fc2.weight",
        "decoder.layers.0.mlp.linear_fc1.weight": "decoder.layers.4.mlp.linear_fc1.weight",
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    }


def check_buckets(buckets: list[list[int]]) -> None:
    assert len(buckets) > 3
    for sizes in buckets:
        assert sum(sizes) <= BUCKET_BYTES or len(sizes) == 1
    for before, after in itertools.pairwise(buckets):
        assert sum(before) + after[0] > BUCKET_BYTES, "two buckets that would fit into one"


def check_streams(
    streams: list[dict[str, np.ndarray]], stored: dict[str, np.ndarray], layout: dict[str, int], where: str
) -> None:
    """Each tensor is sent by one rank: one sender per stage and expert-parallel place, none of them a replica."""
    names = [name for stream in streams for name in stream]
    assert len(names) == len(set(names)), where
    assert_same({name: value for stream in streams for name, value in stream.items()}, stored, where)
    assert sum(bool(stream) for stream in streams) == layout.get("pp", 1) * layout.get("ep", 1), where
    for stream in streams:
        assert len({int(name.split(".")[5]) // 2 for name in stream if ".experts." in name}) <= 1 or layout.get("ep", 1) == 1


def check_stages(streams: list[dict[str, np.ndarray]], stored: dict[str, np.ndarray], layout: dict[str, int], where: str) -> None:
    """Sent per stage, the same tensors come from the first rank of each stage, experts from elsewhere among them."""
    names = [name for stream in streams for name in stream]
    assert len(names) == len(set(names)), where
    assert_same({name: value for stream in streams for name, value in stream.items()}, stored, where)
    per_stage = len(streams) // layout.get("pp", 1)
    assert [bool(stream) for stream in streams] == [rank % per_stage == 0 for rank in range(len(streams))], where


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=f"{where}, {name}")


def same_logits(one: Path, other: Path) -> bool:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(VOCAB)[None, ::7]
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (one, other))
    return torch.equal(first, second)


# ---- what runs in the ranks


def start(rank: RankInfo, path: Path, layout: dict[str, int], dtype: str = "float32") -> TrainerRank:
    return TrainerRank(str(path), ParallelConfig(**layout), None, rank, device="cpu", dtype=dtype, seed=1)


def round_trips(
    rank: RankInfo, cases: list[tuple[str, dict[str, int]]], models: dict[str, Path], root: Path, ports: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    results = []
    for number, ((family, layout), (first, second)) in enumerate(zip(cases, ports, strict=True)):
        engine = start(replace(rank, master_port=first), models[family], layout)
        buckets, own = list(engine.stream(BUCKET_BYTES, to=0)), list(engine.stream(BUCKET_BYTES))
        assert (rank.rank in engine.senders()) == any(own)
        stages = list(engine.stream(BUCKET_BYTES, per_stage=True))
        assert (rank.rank in engine.senders(per_stage=True)) == any(stages)
        with torch.no_grad():  # what was handed out must not change with the model
            for parameter in engine.models[0].parameters():
                parameter.add_(1.0)
        exported = {name: tensor.numpy().copy() for bucket in buckets for name, tensor in bucket}
        sizes = [[tensor.nbytes for _, tensor in bucket] for bucket in buckets]
        stream = {name: tensor.numpy().copy() for bucket in own for name, tensor in bucket}
        staged = {name: tensor.numpy().copy() for bucket in stages for name, tensor in bucket}
        results.append({"exported": exported, "buckets": sizes, "stream": stream, "stages": staged})
        engine.close()

        engine = start(replace(rank, master_port=second), models[family], layout)
        from ctpo_megatron.mcore.hf.export import save_hf

        save_hf(engine.models, engine.shape, models[family], root / str(number), SHARD_BYTES)
        engine.close()
    return results


def save_bfloat16(rank: RankInfo, source: Path, target: Path) -> None:
    target.mkdir()
    (target / "stale").write_text("from before")
    engine = start(rank, source, {}, "bfloat16")
    engine.save_hf(target)
    engine.close()


def load_all(rank: RankInfo, directories: dict[str, Path], ports: list[int]) -> dict[str, str]:
    import torch.distributed as dist

    errors = {}
    for (name, path), port in zip(directories.items(), ports, strict=True):
        try:
            start(replace(rank, master_port=port), path, {}).close()
            errors[name] = ""
        except ModelError as error:
            errors[name] = str(error)
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return errors


def translate_names(_rank: RankInfo) -> dict[str, str]:
    from ctpo_megatron.models.tensors import parameter_key

    names = (
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight3",
        "decoder.layers.0.mlp.experts.linear_fc2.weight10",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "embedding.word_embeddings.weight",
    )
    return {name: parameter_key(name, layers=[4, 7], first_expert=8) for name in names}
