"""Where a run of `ctpo sft` begins, and which checkpoints it does not go on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config, load_config
from ctpo_megatron.data.demonstrations import Demonstrations
from ctpo_megatron.errors import DataError, InputError
from ctpo_megatron.jobs.resume import checkpoint_to_resume
from ctpo_megatron.jobs.sft_start import SftStart, checkpoint_of_sft, is_done, sft_start
from ctpo_megatron.loop.state import RunState, Supervised
from ctpo_megatron.record.events import discard
from ctpo_megatron.types import TrainSample
from tests.support.checkpoints import state_after, write_checkpoint

ROOT = Path(__file__).parents[3]


def config(run_dir: Path, *words: str) -> RunConfig:
    given = [f"run_dir={run_dir}", "sft.steps=null", "sft.epochs=2", "sft.batch_size=4", "optimizer.warmup_steps=0", *words]
    return load_config(ROOT / "configs" / "quickstart_sft.yaml", given)


def sources(*more: int) -> dict[str, list[TrainSample]]:
    numbers = [*range(10), *more]
    return {"": [TrainSample([n], [n], [True], [0.0], [-1], [1.0]) for n in numbers]}


def state(run: RunConfig, step: int) -> RunState:
    stream = Demonstrations(sources(), run.data, run.seed)
    stream.next(4 * step)
    return RunState(step, 4 * step, stream.state(), {}, supervised=Supervised(tokens=4.0 * step, smoothed=1.5))


def begun(run: RunConfig, step: int = 2) -> SftStart:
    """Where it goes on from a checkpoint of its step."""
    found = checkpoint_of_sft(run, "newest", discard)
    assert found is not None
    return sft_start(run, sources(), found)


def test_a_run_goes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    run = config(tmp_path)
    assert checkpoint_of_sft(run, "no", discard) is None
    assert checkpoint_of_sft(run, "auto", discard) is None
    fresh = sft_start(run, sources(), None)
    assert (fresh.total_steps, fresh.schedule, fresh.step, fresh.state) == (5, 5, 0, Supervised())
    write_checkpoint(tmp_path / "checkpoints", 2, state(run, 2), optimizer_steps=2)
    start = begun(run)
    assert (start.total_steps, start.schedule, start.step, start.drawn) == (5, 5, 2, 8)
    assert start.state == Supervised(tokens=8.0, smoothed=1.5)
    stream = Demonstrations(sources(), run.data, run.seed)
    assert stream.next(20)[8:] == start.demonstrations.next(12)
    with pytest.raises(InputError, match="go on from it with --resume"):
        checkpoint_of_sft(run, "no", discard)


def test_batch_size_and_epochs_may_change_on_the_way(tmp_path: Path) -> None:
    """Eight of twenty examples are done; the rest takes as many steps as it now does. Skipped steps made no optimizer step."""
    run = config(tmp_path)
    write_checkpoint(tmp_path / "checkpoints", 2, state(run, 2), optimizer_steps=1)
    start = begun(config(tmp_path, "sft.batch_size=6"))
    assert (start.total_steps, start.schedule) == (4, 3)
    assert begun(config(tmp_path, "sft.epochs=4")).total_steps == 10
    with pytest.raises(InputError, match=r"already has 2 of 2 steps; raise sft.steps or sft.epochs"):
        begun(config(tmp_path, "sft.steps=2"))


def test_other_demonstrations_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    run = config(tmp_path)
    write_checkpoint(tmp_path / "checkpoints", 2, state(run, 2), optimizer_steps=2)
    found = checkpoint_of_sft(run, "auto", discard)
    with pytest.raises(DataError, match=r"demonstrations changed since .*data\.allow_change=true"):
        sft_start(run, sources(99), found)
    start = sft_start(config(tmp_path, "data.allow_change=true"), sources(99), found)
    assert (start.step, start.drawn, start.total_steps) == (2, 8, 6)
    assert len(start.demonstrations) == 11


def test_neither_command_goes_on_from_the_others_checkpoint(tmp_path: Path) -> None:
    run = config(tmp_path)
    write_checkpoint(tmp_path / "checkpoints", 4, state_after(4))
    with pytest.raises(InputError, match="is of `ctpo train`; go on with that command"):
        checkpoint_of_sft(run, "auto", discard)
    write_checkpoint(tmp_path / "checkpoints", 5, replace(state(run, 2), step=5))
    with pytest.raises(InputError, match="is of `ctpo sft`; go on with that command"):
        checkpoint_to_resume(run, "auto", discard)


def test_going_on_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint in .*; start without --resume"):
        checkpoint_of_sft(config(tmp_path), "newest", discard)


@pytest.mark.parametrize(
    ("summary", "done"),
    [(None, False), ({"steps": 5, "end": "steps"}, True), ({"steps": 4, "end": "steps"}, False)]
    + [({"steps": 2, "end": end}, True) for end in ("stop_loss", "patience")],
)
def test_when_there_is_nothing_left_to_do(tmp_path: Path, summary: dict[str, object] | None, done: bool) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert is_done(config(tmp_path), 10, None) is done


def test_a_run_that_went_on_behind_its_summary_is_not_done(tmp_path: Path) -> None:
    """It had ended by patience, was given more of it, and was stopped."""
    run = config(tmp_path)
    write_checkpoint(tmp_path / "checkpoints", 3, state(run, 3), optimizer_steps=3)
    found = checkpoint_of_sft(run, "auto", discard)
    for steps, done in ((2, False), (3, True)):
        (tmp_path / "summary.json").write_text(json.dumps({"steps": steps, "end": "patience"}))
        assert is_done(run, 10, found) is done


def test_a_run_that_lost_its_end_alone_goes_on_to_its_export(tmp_path: Path) -> None:
    """All steps are in the checkpoint, and no summary was written."""
    run = config(tmp_path)
    write_checkpoint(tmp_path / "checkpoints", 5, replace(state(run, 5), groups=20), optimizer_steps=5)
    found = checkpoint_of_sft(run, "auto", discard)
    assert not is_done(run, 10, found)
    start = sft_start(run, sources(), found, "auto")
    assert (start.step, start.total_steps, start.schedule) == (5, 5, 5)
    with pytest.raises(InputError, match="already has 5 of 5 steps"):
        sft_start(run, sources(), found)


@pytest.mark.parametrize(
    ("words", "best_step", "kept"),
    [
        ((), 1, True),
        (("sft.patience=2", "sft.eval_every=1"), 2, True),
        (("sft.patience=2", "sft.eval_every=1"), 1, False),  # whose checkpoint is gone, or never was
        (("sft.eval=other.jsonl",), 2, False),
    ],
)
def test_the_lowest_held_out_loss_is_kept_where_later_ones_compare_with_it(
    tmp_path: Path, words: tuple[str, ...], best_step: int, kept: bool
) -> None:
    first = config(tmp_path, "sft.eval=held_out.jsonl")
    done = state(first, 2)
    best = replace(done.supervised, best=0.5, best_step=best_step, waited=1)
    write_checkpoint(tmp_path / "checkpoints", 2, replace(done, supervised=best), optimizer_steps=2, resolved=dump_config(first))
    now = begun(config(tmp_path, "sft.eval=held_out.jsonl", *words)).state
    assert now == (best if kept else replace(best, best=None, best_step=0, waited=0))
