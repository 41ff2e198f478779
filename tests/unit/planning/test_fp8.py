"""What a plan counts for `train.fp8`, against the tensors of the model one by one."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest

from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.jobs.plan import plan_of
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.planning.fp8 import weight_copies
from ctpo_megatron.planning.plan import Hardware

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
NO_PRODUCTS = ("norm", "embed_tokens", "lm_head", ".gate.weight", "e_score_correction_bias")  # megatron's own, without fp8


def shape_of(name: str) -> ModelShape:
    return parse_config(json.loads((CONFIGS / "models" / name / "config.json").read_text()))


def bytes_of(matrix: tuple[int, ...], recipe: str) -> Fraction:
    """Both copies of a matrix, with the scales that each recipe is defined by."""
    rows, columns = matrix
    blocks = {"blockwise": Fraction(4 * rows * columns, 128 * 128), "mxfp8": Fraction(rows * columns, 32)}
    return 2 * (rows * columns + blocks.get(recipe, Fraction(0)))


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-30b-a3b", "deepseek-v3"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_two_copies_of_every_matrix_of_a_layer(name: str, recipe: str) -> None:
    shape = shape_of(name)
    matrices = [each.shape for each in hf_tensors(shape) if not any(part in each.name for part in NO_PRODUCTS)]
    matrices = [each for each in matrices if len(each) == 2]
    expected = math.ceil(sum(bytes_of(each, recipe) for each in matrices))
    assert weight_copies(shape, ParallelConfig(), Fp8Config(recipe=recipe)) == [expected]


def test_ranks_share_them_and_some_layers_have_none() -> None:
    shape, each = shape_of("qwen3-235b-a22b"), Fp8Config(recipe="tensorwise")
    (whole,) = weight_copies(shape, ParallelConfig(), each)
    cut = ParallelConfig(tp=4, pp=2, dp=2, ep=8)
    experts = 2 * shape.num_layers * shape.experts.count * 3 * shape.hidden_size * shape.experts.ffn_hidden_size
    assert sum(weight_copies(shape, cut, each)) == (whole - experts) // 4 + experts // 8
    kept = Fp8Config(recipe="tensorwise", bf16_layers_at_start=1, bf16_layers_at_end=2)
    assert weight_copies(shape, ParallelConfig(), kept) == [whole // shape.num_layers * (shape.num_layers - 3)]


def test_a_plan_counts_them_as_what_stays_on_the_gpu() -> None:
    """The projection's second copy of attention's output comes with `delayed` alone."""

    def stage_of(*overrides: str):
        (stage,) = plan_of(load_config(CONFIGS / "qwen3-4b.yaml", list(overrides)), shape_of("qwen3-4b"), Hardware()).stages
        return stage.memory

    plain, blockwise, delayed = stage_of(), stage_of("train.fp8={recipe: blockwise}"), stage_of("train.fp8={recipe: delayed}")
    (copies,) = weight_copies(shape_of("qwen3-4b"), ParallelConfig(tp=2, cp=2), Fp8Config(recipe="blockwise"))
    assert blockwise.total - plain.total == blockwise.resident - plain.resident == copies > 0
    tokens, heads, width = 12288, 32 // 2, 128
    assert delayed.working - blockwise.working == 2 * tokens * heads * width, "recomputed, and its gradient"
