"""What several ranks saw of a step becomes one page: the same first place, whoever saw it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.dumps import CONFIG, StepDump
from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs import replay
from ctpo_megatron.jobs.replay import ReplayReport, batch_faults, known_terms, prepare_replay
from ctpo_megatron.jobs.replay_page import page
from ctpo_megatron.mcore.replay.findings import (
    Merged,
    ModuleSeen,
    Place,
    RankFindings,
    TensorSeen,
    TokenTerms,
    merge_findings,
)
from ctpo_megatron.types import TrainSample
from tests.unit.data.test_dumps import ABOUT_IT

LAYERS = 40
SOUND = RankFindings(0.5, 2.0, [], [], [], [], [], 0, 1.0)


def seen(module: str, order: tuple[int, int], place: Place | None = None, rank: int = 0, bad: int = 1) -> ModuleSeen:
    return ModuleSeen(module, order, 1.5, bad, place, rank)


def term(place: Place, **terms: float) -> TokenTerms:
    names = ("logp", "anchor_logp", "rollout_logp", "log_ratio", "log_ratio_sum", "advantage", "weight", "loss", "gradient")
    return TokenTerms(place, 1, 5, 6, **(dict.fromkeys(names, 0.5) | terms))


def report_of(merged: Merged, **sample: Any) -> ReplayReport:
    streams = {"input_ids": [1, 2], "labels": [2, 3], "mask": [False, True], "rollout_logp": [0.0, -1.0], "versions": [-1, 0]}
    samples = [TrainSample(**(streams | {"advantages": [0.0, 1.0]} | sample))]
    dump = StepDump(Path("run/dumps/step_00000007.2"), ABOUT_IT, samples, [1.0], [3], [])
    return ReplayReport(dump, ParallelConfig(tp=2), "float32", batch_faults(dump), merged, None)


def test_the_first_module_is_by_layer_and_the_first_token_by_sequence() -> None:
    one = replace(SOUND, forward=[seen("decoder.layers.3.mlp", (3, 9), Place(0, 0)), seen("a", (2, 5), Place(7, 1))])
    two = replace(SOUND, forward=[seen("a", (2, 5), Place(4, 8), rank=1), seen("decoder.layers.1", (1, 2), bad=0, rank=1)])
    first = merge_findings([one, two], LAYERS, 8).forward
    assert (first.module, first.layer, first.ranks, first.place) == ("a", 2, [0, 1], Place(4, 8))


def test_the_next_module_tells_the_token_of_an_expert() -> None:
    expert = "decoder.layers.2.mlp.experts.local_experts.3.linear_fc2"
    part = replace(SOUND, forward=[seen(expert, (2, 7)), seen("decoder.layers.2.mlp", (2, 9), Place(5, 3))])
    shown = page(report_of(merge_findings([part], LAYERS, 8)))
    assert f"{expert}, rank 0, sequence 5, position 3 (as decoder.layers.2.mlp shows)" in shown


def test_backward_begins_at_the_end() -> None:
    backward = [seen("decoder.layers.1", (1, 4), Place(0, 0)), seen("decoder.layers.30.mlp", (30, 2), Place(2, 2))]
    gradients = [TensorSeen("model.embed", 0, 1.0, 3, 0), TensorSeen("model.layers.30.up", 9, 2.0, 1, 1)]
    part = replace(SOUND, grad_norm=math.nan, backward=backward, gradients=gradients)
    report = report_of(merge_findings([part], LAYERS, 8))
    assert report.verdict == "backward"
    assert report.merged.backward.module == "decoder.layers.30.mlp"
    assert "model.layers.30.up (rank 1), model.embed (rank 0)" in page(report)


def test_verdicts_about_the_loss_and_the_norm() -> None:
    assert report_of(merge_findings([SOUND], LAYERS, 8)).verdict == "finite"
    assert report_of(merge_findings([replace(SOUND, grad_norm=math.inf)], LAYERS, 8)).verdict == "norm"
    bad = replace(SOUND, loss=math.inf, tokens=[term(Place(3, 1), loss=math.inf)], bad_tokens=1)
    report = report_of(merge_findings([SOUND, bad], LAYERS, 8))
    assert report.verdict == "loss"
    assert "in the loss: loss of sequence 3, position 1; the forward pass is finite" in page(report)
    faulty = report_of(merge_findings([replace(bad, loss=math.nan)], LAYERS, 8), advantages=[0.0, math.nan])
    assert faulty.verdict == "batch"
    assert "in the batch: advantages of sequence 3, position 1: nan" in page(faulty)
    content = faulty.content()
    assert json.loads(json.dumps(content, allow_nan=False))["loss"] == "NaN"


def test_many_layers_are_shown_around_the_first_fault() -> None:
    part = replace(SOUND, forward=[seen("decoder.layers.37.mlp", (37, 1), Place(0, 0))])
    shown = page(report_of(merge_findings([part], LAYERS, 8)))
    assert "     37 " in shown
    assert "     15 " not in shown
    assert "(40 layers; --json has all)" in shown


def test_what_was_not_known_when_the_step_was_given_up_is_left_out() -> None:
    teachers = [{"name": "a", "type": "copied", "path": "t"}]
    algorithm = AlgorithmConfig.model_validate({"reference": {}, "distillation": {"teachers": teachers}})
    known = {"anchor_logp": torch.zeros(2), "reference_logp": torch.zeros(2)}

    def left_of(anchors: list[dict[str, torch.Tensor]], **sample: Any) -> tuple[bool, bool, str | None]:
        dump = replace(report_of(merge_findings([SOUND], LAYERS, 8), **sample).dump, anchors=anchors)
        left, words = known_terms(dump, algorithm)
        return left.reference is not None, left.distillation is not None, words

    told = {"teacher": 0, "teacher_logp": [math.nan, -1.0]}
    assert left_of([known], **told) == (True, True, None)
    assert left_of([known], teacher=-1) == (True, True, None)
    assert left_of([known], teacher=0)[1] is False
    reference, distillation, words = left_of([], teacher=0, teacher_logp=[0.0, math.nan])
    assert (reference, distillation) == (False, False)
    assert words is not None
    assert "before the reference policy was asked" in words
    assert "before a teacher was asked" in words


def test_what_cannot_be_replayed_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    for overrides, words in (
        (["parallel.tpp=2"], "tpp"),
        (["train.steps=2"], "train"),
        ([], "there is no dump.json"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            prepare_replay(tmp_path, overrides)
        assert caught.value.exit_code == 2


def test_a_critic_is_of_no_account_where_training_was_supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ctpo sft` leaves it out of the same configuration, so its dumps can be computed again."""
    quickstart = (Path(__file__).parents[3] / "configs" / "quickstart.yaml").read_text()
    (tmp_path / CONFIG).write_text(quickstart.replace("\nalgorithm:\n", "\nalgorithm:\n  advantage: {type: gae}\n"))
    reached = InputError("the model is looked at")

    def look(_dump: StepDump) -> None:
        raise reached

    monkeypatch.setattr(replay, "_model", look)
    for kind, words in (("policy", "critic"), ("supervised", str(reached))):
        dump = StepDump(tmp_path, replace(ABOUT_IT, kind=kind), [], [], [], [])
        monkeypatch.setattr(replay, "read_dump", lambda _directory, found=dump: found)
        with pytest.raises(InputError, match=words):
            prepare_replay(tmp_path, [])
