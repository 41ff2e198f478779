"""The loop of supervised training, over ranks that only take notes: what is trained on when, measured, kept and gone on from."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.data.demonstrations import Demonstrations
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.loop.sft import SftLoop, SftResult
from ctpo_megatron.loop.state import RunState, Supervised
from ctpo_megatron.record.events import Event, StepTrained
from ctpo_megatron.record.values import Mean, Sum, Values
from ctpo_megatron.types import TrainSample
from tests.support.checkpoints import write_checkpoint
from tests.support.often import often

ROOT = Path(__file__).parents[3]
HELD_OUT = "sft.eval=held_out.jsonl"


def sample(number: int, length: int = 3) -> TrainSample:
    """A demonstration that is known by its tokens."""
    ids = [number] * length
    return TrainSample(ids, ids, [True] * length, [0.0] * length, [-1] * length, [1.0] * length, group=number)


def config(*words: str) -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart_sft.yaml", ["sft.steps=null", "sft.batch_size=4", *words])


def numbers(batch: TrainBatch) -> list[int]:
    """Which demonstrations a batch holds."""
    found = []
    for mb in (mb for rank in batch.micro_batches for mb in rank):
        starts = mb.sequences.cu_seqlens[:-1]
        found += [int(mb.tokens.input_ids[start]) for start in starts if bool(mb.tokens.mask[start])]
    return found


class Ranks:
    """Takes down what it is to train and to measure. `held_out`: the losses of the measurements, in their order."""

    def __init__(self, *held_out: float) -> None:
        self.trained: list[list[int]] = []
        self.measured: list[list[int]] = []
        self.loaded: list[str] = []
        self._losses = iter(held_out)

    async def supervise(self, batch: TrainBatch) -> Values:
        self.trained.append(sorted(numbers(batch)))
        count = float(sum(int(mb.tokens.mask.sum()) for rank in batch.micro_batches for mb in rank))
        return {"nll": Mean(count / len(self.trained), count), "tokens": Sum(count), "grad_norm": Mean(1.0), "lr": Mean(0.5)}

    async def assess(self, batch: TrainBatch) -> Values:
        found = numbers(batch)
        self.measured.append(found)
        loss, count = next(self._losses), float(sum(found))
        return {"nll": Mean(loss * count, count), "tokens": Sum(count)}

    async def load(self, directory: Path) -> None:
        self.loaded.append(directory.name)


class Saves:
    """Checkpoints that are states in a list."""

    behind = False

    def __init__(self, root: Path) -> None:
        self.root, self.states = root, list[RunState]()

    async def save(self, state: RunState) -> None:
        self.states.append(RunState.parse(state.dump(), "here"))
        write_checkpoint(self.root, state.step, state)

    def check(self) -> None: ...

    async def settle(self) -> None: ...

    async def abandon(self) -> None: ...


class Notes:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.lines if name in metrics}


def loop(given: RunConfig, ranks: Ranks, count: int = 10, saves: Saves | None = None, **options: Any) -> SftLoop:
    sources = options.pop("sources", {"": [sample(n) for n in range(count)]})
    demonstrations = Demonstrations(sources, given.data, given.seed, options.pop("cursor", None))
    return SftLoop(given, demonstrations, ranks, Notes(), checkpoints=saves, **options)  # type: ignore[arg-type]


def run(made: SftLoop) -> SftResult:
    return asyncio.run(made.run())


def test_each_demonstration_comes_once_in_every_epoch() -> None:
    ranks = Ranks()
    made = loop(config("sft.epochs=3"), ranks)
    assert run(made).steps == 8  # 30 examples, 4 each and 2 in the last
    assert list(map(len, ranks.trained)) == [4] * 7 + [2]
    assert Counter(n for batch in ranks.trained for n in batch) == dict.fromkeys(range(10), 3)
    seen = [n for batch in ranks.trained[:3] for n in batch]
    assert len(set(seen[:8])) == 8, "the first two steps are of one epoch"
    assert made.recorder.of("sft/epoch") == pytest.approx({step: min(step * 0.4, 3.0) for step in range(1, 9)})  # type: ignore[attr-defined]


def test_each_step_is_told_with_where_its_time_went() -> None:
    told: list[Event] = []
    run(
        loop(
            config("sft.epochs=2", "sft.eval=x.jsonl", "sft.eval_every=2"),
            Ranks(2.0, 1.5, 1.0),
            held_out=[sample(11)],
            emit=told.append,
        )
    )
    steps = [event for event in told if isinstance(event, StepTrained)]
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert ["measure" in step.phases for step in steps] == [False, True, False, True, False]
    assert all(
        {"train", "checkpoint", "storage"} <= set(step.phases) and sum(step.phases.values()) <= step.seconds for step in steps
    )


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("", 1000),
        ("sft.steps=7", 7),
        ("sft.epochs=2", 5),
        ("sft.steps=3 sft.epochs=2", 3),
        ("sft.batch_size=99 sft.epochs=2", 2),
    ],
)
def test_steps_of_a_whole_run(words: str, steps: int) -> None:
    assert config(*words.split()).sft.total_steps(10) == steps


def test_the_smoothed_loss_ends_it() -> None:
    ranks = Ranks()
    made = loop(config("sft.steps=90", "sft.stop_loss=0.5"), ranks)
    result = run(made)
    smoothed, steps = 1.0, 1
    while smoothed >= 0.5:
        steps += 1
        smoothed = 0.9 * smoothed + 0.1 / steps
    assert (result.end, result.steps) == ("stop_loss", steps)
    assert result.loss == pytest.approx(smoothed)
    assert result.tokens == 12.0 * steps


def test_held_out_loss_is_the_mean_over_tokens_and_is_measured_at_the_end_too() -> None:
    ranks = Ranks(1.0, 3.0, 2.0, 2.0, 5.0, 5.0)
    held_out = [sample(n) for n in (1, 1, 1, 1, 8)]  # batches of 4 and 1: 4 and 8 tokens here
    made = loop(config("sft.steps=5", HELD_OUT, "sft.eval_every=2"), ranks, held_out=held_out)
    result = run(made)
    assert made.recorder.of("sft/eval_loss") == pytest.approx({2: (4 + 24) / 12, 4: 2.0, 5: 5.0})  # type: ignore[attr-defined]
    assert ranks.measured[:2] == [[1, 1, 1, 1], [8]]
    assert (result.end, result.eval_loss, result.eval_step) == ("steps", 2.0, 4)
    assert not ranks.loaded


def test_patience_ends_it_and_the_best_weights_come_back(tmp_path: Path) -> None:
    ranks, saves = Ranks(3.0, 2.0, 2.0, 2.5), Saves(tmp_path)
    given = config("sft.steps=90", HELD_OUT, "sft.eval_every=3", "sft.patience=2")
    made = loop(given, ranks, saves=saves, held_out=[sample(1)])
    result = run(made)
    assert (result.end, result.steps, result.eval_loss, result.eval_step) == ("patience", 12, 2.0, 6)  # an equal one is no better
    assert [state.step for state in saves.states] == [3, 6]
    assert made.needed() == (6,)
    assert ranks.loaded == ["step_00000006"]


def test_a_loss_that_is_not_finite_is_no_better_than_none(tmp_path: Path) -> None:
    ranks, saves = Ranks(math.nan, math.inf, 2.0, math.nan, 3.0, 3.0), Saves(tmp_path)
    given = config("sft.steps=90", HELD_OUT, "sft.eval_every=1", "sft.patience=3", "checkpoint.every=1")
    result = run(loop(given, ranks, saves=saves, held_out=[sample(1)]))
    assert (result.end, result.steps, result.eval_loss, result.eval_step) == ("patience", 6, 2.0, 3)
    assert saves.states[1].supervised == Supervised(tokens=24.0, smoothed=0.95, waited=2)


def test_the_best_weights_are_there_already_where_the_last_are_the_best(tmp_path: Path) -> None:
    ranks = Ranks(3.0, 2.0)
    given = config("sft.steps=6", HELD_OUT, "sft.eval_every=3", "sft.patience=1")
    assert run(loop(given, ranks, saves=Saves(tmp_path), held_out=[sample(1)])).end == "steps"
    assert not ranks.loaded


@settings(max_examples=often(12), deadline=None)
@given(cut=st.integers(1, 8), every=st.integers(1, 3), mixed=st.booleans())
def test_a_run_that_goes_on_is_the_run_that_was_not_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int, every: int, mixed: bool
) -> None:
    """The same examples in the same order, and the same losses, measurements and end; from a stop between any two steps."""
    words = ["sft.epochs=3", HELD_OUT, "sft.eval_every=2", "sft.patience=2", f"checkpoint.every={every}"]
    sources = {"": [sample(n) for n in range(10)]}
    if mixed:
        words.append("data.mixture=[{name: more, path: x.jsonl, weight: 2}]")
        sources["more"] = [sample(n) for n in range(20, 23)]
    given, losses = config(*words), [3.0, 2.0, 2.5, 1.0, 4.0, 5.0, 6.0]
    whole = Ranks(*losses)
    wanted = run(loop(given, whole, sources=sources, saves=Saves(tmp_path_factory.mktemp("whole")), held_out=[sample(1)]))
    assert len(whole.trained) == wanted.steps == (10 if mixed else 8)
    orders, saves, first = Orders(), Saves(tmp_path_factory.mktemp("cut")), Ranks(*losses)
    begun = loop(given, first, sources=sources, saves=saves, held_out=[sample(1)], orders=orders)
    supervise = first.supervise

    async def stopping(batch: TrainBatch) -> Values:
        if len(first.trained) + 1 == cut:
            orders.stop(StopRequest("somebody asked"))
        return await supervise(batch)

    first.supervise = stopping  # type: ignore[method-assign]
    stopped = run(begun)
    state = saves.states[-1]
    assert state.supervised is not None
    if stopped.end == "asked":
        assert (stopped.steps, state.step, first.loaded) == (cut, cut, [])
    second = Ranks(*losses[len(first.measured) :])
    where = {"cursor": state.cursor, "first_step": state.step, "drawn": state.groups, "state": state.supervised}
    result = run(loop(given, second, sources=sources, saves=saves, held_out=[sample(1)], **where))
    assert first.trained[: state.step] + second.trained == whole.trained
    assert first.measured + second.measured == whole.measured or stopped.end != "asked"
    assert (result.end, result.steps, result.tokens) == (wanted.end, wanted.steps, wanted.tokens)


def test_what_is_asked_for_while_it_runs_is_saved(tmp_path: Path) -> None:
    orders, saves = Orders(), Saves(tmp_path)
    orders.save()
    assert run(loop(config("sft.steps=3"), Ranks(), saves=saves, orders=orders)).end == "steps"
    assert [state.step for state in saves.states] == [1]
    assert saves.states[0].supervised == Supervised(tokens=12.0, smoothed=1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft.eval_every=2"], "sft.eval_every=2 needs held-out demonstrations"),
        (["sft.patience=2"], "sft.patience=2 needs held-out demonstrations"),
        ([HELD_OUT, "sft.patience=2"], "sft.patience=2 counts measurements; set sft.eval_every"),
    ],
)
def test_settings_that_do_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)
