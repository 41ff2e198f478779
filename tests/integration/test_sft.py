"""`ctpo sft` on the real trainer: what it leaves behind, and that a run that goes on is the run that was not cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.checkpoints.files import step_of, verified_checkpoints
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.runs import Finished, Started

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(1800)]
RUN_S = 600.0


def values(run: Finished, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in run.metrics if name in row}


def test_a_run_is_gone_on_with_and_comes_back_to_its_best_weights(tmp_path: Path) -> None:
    """Two epochs at once; the same in two commands; then a learning rate that spoils the model, and patience that undoes it."""
    task = make_toy_task(tmp_path / "data", seed=1, train_rows=8, eval_rows=4, sft_rows=20)
    held_out = make_toy_task(tmp_path / "held_out", seed=2, train_rows=8, eval_rows=4, sft_rows=6)
    model = make_toy_model(tmp_path / "model", "qwen3", seed=1, init_std=0.2)
    words = (f"model.path={model}", f"data.train={task.sft}", f"sft.eval={held_out.sft}", "sft.batch_size=8", "sft.steps=null")
    plan = ("sft.eval_every=1", "sft.patience=2", "optimizer.schedule=constant", "optimizer.warmup_steps=0", "log.every=1")

    def sft(run_dir: Path, *more: str) -> Finished:
        return Started("sft", "quickstart_sft.yaml", run_dir, *words, *plan, *more).finish(RUN_S)

    whole = sft(tmp_path / "whole", "sft.epochs=2", "optimizer.lr=0.002")
    assert whole.code == 0, whole.output
    assert list(values(whole, "sft/epoch").values()) == [0.4, 0.8, 1.2, 1.6, 2.0]
    assert whole.summary["end"] == "steps"
    assert (whole.run_dir / "model" / "config.json").is_file()
    assert [each["step"] for each in whole.happened("step")] == [1, 2, 3, 4, 5]
    assert [each["how"] for each in whole.happened("incarnation ended")] == ["done"]

    cut = sft(tmp_path / "cut", "sft.epochs=2", "sft.steps=2", "checkpoint.every=2", "optimizer.lr=0.002")
    assert cut.code == 0, cut.output
    refused = sft(tmp_path / "cut", "sft.epochs=2")
    assert refused.code == 2
    assert "go on from it with --resume" in refused.output
    gone_on = sft(tmp_path / "cut", "sft.epochs=2", "checkpoint.every=2", "optimizer.lr=0.002", "--resume")
    assert gone_on.code == 0, gone_on.output
    assert "sft.steps: 2 in the checkpoint" in gone_on.output
    for name in ("sft/loss", "sft/loss_smoothed", "sft/eval_loss", "sft/epoch", "train/grad_norm", "train/lr"):
        assert values(gone_on, name) == values(whole, name), name

    best = gone_on.summary["eval_step"]
    spoilt = sft(tmp_path / "cut", "sft.epochs=9", "optimizer.lr=0.5", "--resume")
    assert spoilt.code == 0, spoilt.output
    assert (spoilt.summary["end"], spoilt.summary["steps"], spoilt.summary["eval_step"]) == ("patience", best + 2, best)
    assert best in map(step_of, verified_checkpoints(tmp_path / "cut" / "checkpoints"))
    assert min(values(spoilt, "sft/eval_loss").values()) == spoilt.summary["eval_loss"]
    measured = sft(tmp_path / "measured", f"model.path={spoilt.run_dir / 'model'}", "sft.steps=1", "optimizer.lr=1.0e-30")
    assert values(measured, "sft/eval_loss")[1] == pytest.approx(spoilt.summary["eval_loss"], abs=1e-6), "of the best weights"
    again = sft(tmp_path / "cut", "sft.epochs=9", "--resume", "auto")
    assert again.code == 0
    assert "this run has come to its end" in again.output
    begun = [(each["number"], each["step"], each["previous"]) for each in again.happened("incarnation began")]
    assert begun[:2] == [(1, 0, None), (2, 2, "done")]
    assert [each["how"] for each in again.happened("incarnation ended")] == ["done"] * len(begun)
