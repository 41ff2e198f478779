"""The rule by which samples without an advantage go without a pass, and what a step says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config.load import load_config
from ctpo_megatron.loop.sparing import wants_every_sample
from ctpo_megatron.loop.statistics import spared_share
from ctpo_megatron.models.shape import Experts

ROOT = Path(__file__).parents[3]
EXPERTS = Experts(layers=(True,), count=4, top_k=2, ffn_hidden_size=8)


@pytest.mark.parametrize(
    ("overrides", "experts", "reason"),
    [
        ([], None, None),
        (["moe.z_loss_coeff=0.1", "moe.aux_loss_coeff=0.1"], None, None),
        (["algorithm.advantage={type: gae}"], None, "algorithm.advantage"),
        (["train.spare=false"], None, "train.spare is false"),
        (["algorithm.reference.coeff=0.1"], None, "algorithm.reference"),
        (["algorithm.distillation.teachers=[{name: a, type: copied, path: t}]"], None, "algorithm.distillation"),
        (["algorithm.objective={type: kpop}"], None, None),
        (["algorithm.objective={type: kpop, penalty: 0.1}"], None, "algorithm.objective"),
        ([], EXPERTS, None),
        ([], replace(EXPERTS, aux_loss_coeff=0.01), "moe.aux_loss_coeff"),
        (["moe.aux_loss_coeff=0"], replace(EXPERTS, aux_loss_coeff=0.01), None),
        (["moe.aux_loss_coeff=0.1"], EXPERTS, "moe.aux_loss_coeff"),
        (["moe.z_loss_coeff=0.1"], EXPERTS, "moe.z_loss_coeff"),
        (["moe.bias_update_rate=0.1"], EXPERTS, "moe.bias_update_rate"),
    ],
)
def test_what_has_a_gradient_without_an_advantage_wants_every_sample(
    overrides: list[str], experts: Experts | None, reason: str | None
) -> None:
    shape: Any = SimpleNamespace(experts=experts)
    assert wants_every_sample(load_config(ROOT / "configs" / "quickstart.yaml", overrides), shape) == reason


def test_the_share_counts_branches_as_samples() -> None:
    group: Any = SimpleNamespace(trajectories=[SimpleNamespace(branches=[0]), SimpleNamespace(branches=[])])
    batches = [TrainBatch([], {0: 5}), TrainBatch([], {2: 1})]
    assert spared_share(batches, [group]) == {"train/spared": pytest.approx(2 / 3)}
