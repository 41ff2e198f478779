"""Which parallel layouts are refused, by the sizes alone and by the model's shape, and how layers fall to pipeline stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.rules import Overlap, check_layout, layers_per_stage, overlap_of
from ctpo_megatron.models.shape import Experts, HeadAttention, ModelShape, Rope

DENSE = ModelShape(
    family="qwen3",
    num_layers=6,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=8,
    attention=HeadAttention(num_kv_heads=4, head_dim=16),
    vocab_size=301,
    max_positions=128,
    rope=Rope(10000.0),
    rms_eps=1e-6,
    tie_embeddings=False,
)
EXPERTS = Experts(count=6, top_k=2, ffn_hidden_size=48, layers=(True,) * 6)
MOE = replace(DENSE, family="qwen3_moe", ffn_hidden_size=97, experts=EXPERTS)
HALF = replace(MOE, experts=replace(EXPERTS, layers=(False,) + (True,) * 5))  # one layer is dense
SHARED = replace(MOE, experts=replace(EXPERTS, shared_ffn_hidden_size=33))


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        (DENSE, {"tp": 3}, ["parallel.tp = 3", "8 attention heads", "1, 2, 4, 8"]),
        (DENSE, {"tp": 8}, ["parallel.tp = 8", "4 key-value heads", "1, 2, 4"]),
        (DENSE, {"pp": 4}, ["parallel.pp = 4", "6 layers", "1, 2, 3, 6"]),
        (DENSE, {"pp": 2, "vpp": 2}, ["parallel.pp * parallel.vpp = 4", "6 layers"]),
        (replace(DENSE, ffn_hidden_size=97), {"tp": 2}, ["parallel.tp = 2", "97 feed-forward units"]),
        (HALF, {"tp": 2}, ["parallel.tp = 2", "97 feed-forward units"]),
        (SHARED, {"tp": 2}, ["parallel.tp = 2", "33 feed-forward units of the shared expert"]),
        (DENSE, {"ep": 2, "dp": 2}, ["parallel.ep = 2", "dense", "allowed is 1"]),
        (DENSE, {"etp": 2, "tp": 2}, ["parallel.etp = 2", "dense", "allowed is 1"]),
        (
            MOE,
            {"dp": 2, "overlap_grad_reduce": True},
            ["parallel.overlap_grad_reduce: qwen3_moe is a mixture", "set it to null or false"],
        ),
        (
            MOE,
            {"dp": 2, "overlap_param_gather": True},
            ["parallel.overlap_param_gather", "qwen3_moe is a mixture", "null or false"],
        ),
        (
            DENSE,
            {"dp": 2, "overlap_grad_reduce": False, "overlap_param_gather": True},
            ["parallel.overlap_param_gather", "overlap_grad_reduce is false", "null or false"],
        ),
        (MOE, {"ep": 4, "dp": 4}, ["parallel.ep = 4", "6 experts", "1, 2, 3, 6"]),
        (MOE, {"etp": 5, "dp": 5}, ["parallel.etp = 5", "48 feed-forward units of each expert"]),
        (DENSE, {"pp": 2, "first_stage_layers": 6}, ["first_stage_layers = 6", "leave 0 layers for 1 other"]),
        (DENSE, {"pp": 2, "first_stage_layers": 2, "last_stage_layers": 3}, ["leave 1 layers for 0 other"]),
        (DENSE, {"pp": 3, "first_stage_layers": 1}, ["leave 5 layers", "2 other pipeline stages cannot share"]),
        (DENSE, {"pp": 2, "vpp": 2, "first_stage_layers": 3}, ["a pipeline stage 3 layers", "parallel.vpp = 2"]),
        (HALF, {"pp": 2, "first_stage_layers": 1}, ["pipeline stage 0 has the layers 0 and none with experts", "each stage"]),
    ],
)
def test_shapes_that_a_layout_cannot_divide(shape: ModelShape, sizes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(shape, ParallelConfig(**sizes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"ep": 2}, "ep*etp=2 does not divide tp*cp*dp=1"),
        ({"tp": 2, "ep": 2, "etp": 2}, "ep*etp=4 does not divide tp*cp*dp=2"),
        ({"vpp": 2}, "pp=1 has one"),
        ({"first_stage_layers": 2}, "first_stage_layers=2 splits a pipeline"),
        ({"last_stage_layers": 2}, "last_stage_layers=2 splits a pipeline"),
    ],
)
def test_sizes_that_do_not_go_together(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ParallelConfig(**sizes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "sizes", "adapted", "expected"),
    [
        (DENSE, {"dp": 2}, False, Overlap(grad_reduce=True, param_gather=True)),
        (DENSE, {"cp": 2}, False, Overlap(grad_reduce=True, param_gather=True)),
        (DENSE, {"dp": 2}, True, Overlap(grad_reduce=True, param_gather=False)),
        (DENSE, {"tp": 2, "pp": 2}, False, Overlap(grad_reduce=False, param_gather=False)),
        (DENSE, {"dp": 2, "overlap_grad_reduce": False}, False, Overlap(grad_reduce=False, param_gather=False)),
        (DENSE, {"dp": 2, "overlap_param_gather": False}, False, Overlap(grad_reduce=True, param_gather=False)),
        (DENSE, {"tp": 2, "overlap_param_gather": True}, False, Overlap(grad_reduce=True, param_gather=True)),
        (MOE, {"dp": 2}, False, Overlap(grad_reduce=False, param_gather=False)),
    ],
)
def test_what_can_go_on_beside_computing_does(shape: ModelShape, sizes: dict[str, Any], adapted: bool, expected: Overlap) -> None:
    assert overlap_of(shape, ParallelConfig(**sizes), adapted=adapted) == expected


def test_weights_of_adapters_are_not_gathered_beside_a_pass() -> None:
    with pytest.raises(ConfigError, match="adapters are used in that of the layer"):
        check_layout(DENSE, ParallelConfig(dp=2, overlap_param_gather=True), adapted=True)


@pytest.mark.parametrize(
    ("shape", "sizes", "stages"),
    [
        (DENSE, {"tp": 4, "pp": 3, "cp": 5, "dp": 7}, [2, 2, 2]),
        (DENSE, {"pp": 3, "vpp": 2}, [2, 2, 2]),
        (DENSE, {"pp": 2, "first_stage_layers": 5}, [5, 1]),
        (DENSE, {"pp": 2, "last_stage_layers": 5}, [1, 5]),
        (DENSE, {"pp": 4, "first_stage_layers": 1, "last_stage_layers": 1}, [1, 2, 2, 1]),
        (DENSE, {"pp": 2, "vpp": 2, "first_stage_layers": 4}, [4, 2]),
        (MOE, {"tp": 2, "pp": 6, "dp": 3, "ep": 6}, [1] * 6),
        (MOE, {"tp": 2, "dp": 3, "ep": 3, "etp": 2}, [6]),
    ],
)
def test_layouts_that_divide(shape: ModelShape, sizes: dict[str, int], stages: list[int]) -> None:
    parallel = ParallelConfig(**sizes)
    check_layout(shape, parallel)
    assert layers_per_stage(shape.num_layers, parallel) == stages


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 1e-6, "min_lr": 1e-5}, "min_lr=1e-05 is above lr=1e-06"),
        ({"schedule": "wsd"}, "wsd_decay_steps go together"),
        ({"wsd_decay_steps": 5}, "wsd_decay_steps go together"),
        ({"exp_avg_dtype": "bfloat16"}, "need precision_aware=true"),
        ({"precision_aware": True, "cpu_offload": 0.5}, "exclude each other"),
    ],
)
def test_optimizers_that_contradict_themselves(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        OptimizerConfig(**options)
    assert words in str(caught.value)
