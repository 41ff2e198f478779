"""The loop over parts that answer at once: what it trains on, writes down and goes on from."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.loop.checkpoints import newest
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.loop.report import RunTotals, StepCost
from ctpo_megatron.record.events import EvaluationDone, StepTrained, WeightsPublished, discard
from ctpo_megatron.record.token_files import StoredTokens, TokenRecord, token_file
from ctpo_megatron.types import GroupId
from tests.support.loops import PROMPTS, SEED, Noted, Straggling, config, rows, train


@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_a_resumed_run_goes_on_at_the_right_prompt_whatever_a_step_takes_now(tmp_path: Path, per_step: int) -> None:
    """Three steps of three groups, then two of `per_step`: no prompt is left out, none comes twice."""
    first, _, _ = asyncio.run(train(config("train.steps=3", "train.prompts_per_step=3"), tmp_path, resume=False))
    more = config("train.steps=5", f"train.prompts_per_step={per_step}", "rollout.group_size=3")
    second, loop, _ = asyncio.run(train(more, tmp_path, resume=True))
    assert loop.samples == 3 * 3 * 2 + 2 * per_step * 3
    assert newest(tmp_path / "checkpoints", 9, discard).state.samples == loop.samples
    expected = [prompt.index for prompt in PromptSampler(PROMPTS, SEED).next(9 + 2 * per_step)]
    assert [index for index, _ in first + second] == expected
    assert [group for _, group in first + second] == [str(GroupId(n)) for n in range(len(expected))]
    assert sorted(loop.accuracies) == [0, 2, 3, 4, 5]


def test_what_was_in_flight_when_a_run_ended_is_sampled_again_under_the_same_ids(tmp_path: Path) -> None:
    """The groups of step 3 were admitted, one step ahead, when the checkpoint after step 2 was written."""
    sizes = ("train.prompts_per_step=3",)
    first, _, _ = asyncio.run(train(config("train.steps=3", *sizes), tmp_path, resume=False))
    (tmp_path / "checkpoints" / "step_00000003").rename(tmp_path / "lost")
    second, _, _ = asyncio.run(train(config("train.steps=3", *sizes), tmp_path, resume=True))
    assert second == first[6:]


def test_a_group_that_goes_on_is_in_the_checkpoint_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    sizes = ("train.prompts_per_step=2", "train.oversample=1", "train.steps=2", "eval.every=0")
    _, whole, _ = asyncio.run(train(config(*sizes), tmp_path, resume=False, rollouts=Straggling()))
    assert [{row["group"] for row in rows(tmp_path, f"step_0000000{step}.jsonl")} for step in (1, 2)] == [
        {"g00000001", "g00000002"},
        {"g00000000", "g00000003"},
    ]
    (tmp_path / "checkpoints" / "step_00000002").rename(tmp_path / "lost")
    state = newest(tmp_path / "checkpoints", 9, discard).state
    assert (state.groups, [group.number for group in state.open], state.oldest_group) == (3, [0], 0)
    again, resumed, _ = asyncio.run(train(config(*sizes), tmp_path, resume=True, rollouts=Straggling()))
    assert [group for _, group in again] == ["g00000000", "g00000003"]
    assert resumed.ledger.summary() == whole.ledger.summary()
    assert resumed.ledger.summary()["groups"] == {"trained": 4, "filtered": 0, "failed": 0, "aborted": 0}


def test_ids_and_events_reach_the_record(tmp_path: Path) -> None:
    _, loop, events = asyncio.run(train(config("train.steps=2", "train.prompts_per_step=2"), tmp_path, resume=False))
    trained = [row for step in (1, 2) for row in rows(tmp_path, f"step_{step:08d}.jsonl")]
    assert sorted(row["id"] for row in trained) == [f"g0000000{n}.{k}" for n in range(4) for k in range(2)]
    assert {row["group"] for row in rows(tmp_path, "eval_00000002.jsonl")} == {f"e00000002-g0000000{n}" for n in range(2)}
    assert [event.step for event in events if isinstance(event, StepTrained)] == [1, 2]
    assert [event.step for event in events if isinstance(event, EvaluationDone)] == [0, 2]
    assert [event for event in events if isinstance(event, WeightsPublished)] == [WeightsPublished(v, 2, 0.0) for v in (1, 2)]
    summary = loop.totals.summary()
    assert summary["step_seconds"].keys() == {"rollout", "batch", "sleep", "train", "publish", "total"}
    assert summary["rollout_tokens_per_s"] > 0


def test_totals_are_sums_over_steps_and_the_largest_drift() -> None:
    totals = RunTotals()
    for drift in (0.25, 0.5, 0.125):
        totals.add_step(StepCost({"rollout": 2.0, "train": 1.0}, 4.0, sampled_tokens=10, trained_tokens=30), drift)
    totals.add_evaluation(0.5)
    assert totals.summary() == {
        "rollout_tokens_per_s": 5.0,
        "train_tokens_per_s": 30.0,
        "step_seconds": {"rollout": 2.0, "train": 1.0, "total": 4.0},
        "eval_seconds": 0.5,
        "mismatch_max": 0.5,
    }


def test_a_checkpoint_that_is_asked_for_comes_once(tmp_path: Path) -> None:
    orders = Orders()
    orders.save()
    asyncio.run(train(config("train.steps=2", "checkpoint.every=0"), tmp_path, resume=False, orders=orders))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_what_is_copied_is_the_state_after_each_step_with_its_evaluation(tmp_path: Path) -> None:
    copies, three = Noted(), config("train.steps=3", "train.prompts_per_step=2")
    asyncio.run(train(three, tmp_path, resume=False, memory=copies))
    still_open = [[group.number for group in state.open] for state in copies.states]
    assert [(s.step, s.groups, numbers, sorted(s.accuracies)) for s, numbers in zip(copies.states, still_open, strict=True)] == [
        (1, 4, [2, 3], [0]),
        (2, 6, [4, 5], [0, 2]),
        (3, 6, [], [0, 2, 3]),
    ]
    kept = newest(tmp_path / "checkpoints", 9, discard).state
    assert replace(copies.states[-1], alarms=None) == replace(kept, alarms=None)  # of which one has heard of a row more


@pytest.mark.parametrize("kept", [True, False])
def test_what_an_update_made_of_its_tokens_is_written_with_the_step(tmp_path: Path, kept: bool) -> None:
    asked: list[int] = []

    async def tokens_of(batches: list[TrainBatch]) -> TokenRecord:
        asked.append(sum(len(batch.ids()) for batch in batches))
        return TokenRecord(np.array([1] * asked[-1]), *(np.full(asked[-1], len(asked)) for _ in range(2)), np.zeros(asked[-1]))

    wanted = config("train.steps=2", "train.prompts_per_step=3")
    asyncio.run(train(wanted, tmp_path, resume=False, tokens_of=tokens_of if kept else None))
    assert asked == [6, 6] * kept
    written = sorted((tmp_path / "tokens").glob("*"))
    assert [path.name for path in written] == [token_file(1), token_file(2)] * kept
    assert [StoredTokens(path).samples(5, 1).gap.tolist() for path in written] == [[1.0], [2.0]] * kept
