"""Mixtures, pools and curricula: shares, epochs, and that a run that goes on is the same run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.rollout import DataConfig
from ctpo_megatron.data.curriculum import check_curriculum
from ctpo_megatron.data.mixture import new_sampler, restored_sampler
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.data.prompts import read_prompts
from ctpo_megatron.errors import ConfigError, DataError
from ctpo_megatron.types import Prompt
from tests.support.often import often

HERE = "tests.unit.data.curricula"


def prompts(count: int, source: str = "", difficulty: float | None = None) -> list[Prompt]:
    return [
        Prompt(
            i, ({"role": "user", "content": f"{source} {i}"},), str(i), source, i / count if difficulty is None else difficulty
        )
        for i in range(count)
    ]


def data(**options: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "a.parquet", **options})


MIXTURE = [{"name": "hard", "path": "b.parquet", "weight": 3.0}, {"name": "easy", "path": "c.parquet", "weight": 0.5}]
ALL = [*prompts(20), *prompts(30, "hard"), *prompts(8, "easy")]
FORMS = {
    "plain": ({}, prompts(20)),
    "mixture": ({"mixture": MIXTURE}, ALL),
    "column": ({"pools": {"column": "level", "borders": [0.3, 0.6], "weights": [1, 0, 2]}}, prompts(20)),
    "measured": ({"mixture": MIXTURE, "pools": {"borders": [0.1, 0.9], "weights": [1, 1, 4, 1]}}, ALL),
    "curriculum": ({"mixture": MIXTURE, "curriculum": f"{HERE}:towards_hard"}, ALL),
    "counting": ({"mixture": MIXTURE, "curriculum": f"{HERE}:counting"}, ALL),
}


@settings(deadline=None, max_examples=often(60))
@given(form=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 5), steps=st.lists(st.integers(0, 9), min_size=2, max_size=6))
def test_a_run_that_goes_on_draws_the_same_prompts(form: str, seed: int, steps: list[int]) -> None:
    """`steps`: prompts that are drawn before each step is made. The state goes through JSON, as in a checkpoint."""
    options, rows = FORMS[form]
    whole, cut = (new_sampler(rows, data(**options), seed) for _ in range(2))
    for drawn in steps:
        expected = whole.next(drawn)
        assert cut.next(drawn) == expected
        results = [(prompt, float(prompt.index % 3 == 0)) for prompt in expected]
        whole.observe(results)
        cut.observe(results)
        state = json.loads(json.dumps(cut.state(), allow_nan=False))
        cut = restored_sampler(rows, data(**options), seed, state)
        assert json.loads(json.dumps(cut.state())) == state
    assert cut.next(40) == whole.next(40)


def test_sources_come_by_their_weights_each_in_epochs_of_its_own() -> None:
    drawn = new_sampler(ALL, data(mixture=MIXTURE), 1).next(4500)
    shares = Counter(prompt.source for prompt in drawn)
    assert [round(shares[name] / 4500, 1) for name in ("", "hard", "easy")] == [0.2, 0.7, 0.1]
    of_hard = [prompt.index for prompt in drawn if prompt.source == "hard"]
    for epoch in range(0, 300, 30):
        assert sorted(of_hard[epoch : epoch + 30]) == list(range(30))
    assert {prompt.key for prompt in drawn} == {str(i) for i in range(20)} | {f"hard:{i}" for i in range(30)} | {
        f"easy:{i}" for i in range(8)
    }


def test_pools_by_a_column_and_without_anything_it_is_todays_order() -> None:
    options, rows = FORMS["column"]
    levels = Counter(
        sum(p.difficulty >= border for border in (0.3, 0.6)) for p in new_sampler(rows, data(**options), 1).next(3000)
    )
    assert levels[1] == 0
    assert levels[2] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert new_sampler(rows, data(), 4).next(50) == PromptSampler(rows, 4).next(50)


def test_prompts_move_between_measured_pools() -> None:
    """Those that are sometimes right come most often; what is always or never right has no weight."""
    rows = prompts(12)
    sampler = new_sampler(rows, data(pools={"borders": [0.1, 0.9], "weights": [1, 0, 1, 0]}), 2)
    for _ in range(40):
        drawn = sampler.next(2)
        sampler.observe([(prompt, (0.0, 0.5, 1.0)[prompt.index % 3]) for prompt in drawn])
    assert {prompt.index for prompt in sampler.next(200)} == {1, 4, 7, 10}
    places, drawn, _, _ = sampler.state()["measured"]["train"]["drawn"]
    counts = [count for place, count in zip(places, drawn, strict=True) if place % 3 == 1]
    assert max(counts) - min(counts) <= 1, "one of a pool came again before another had come"


def test_a_curriculum_is_asked_after_each_step_and_keeps_its_state() -> None:
    options, rows = FORMS["curriculum"]
    sampler = new_sampler(rows, data(**options), 1)
    assert {prompt.source for prompt in sampler.next(30)} == {"easy"}
    for _ in range(3):
        sampler.observe([(prompts(8, "easy")[0], 1.0)])
    assert sampler.state()["curriculum"] == {"asked": 4, "last": 1.0}
    assert {prompt.source for prompt in sampler.next(30)} == {"hard"}


def test_a_state_that_was_given_out_does_not_change() -> None:
    """A copy in memory is of its own step, whatever the curriculum does to its state later."""
    options, rows = FORMS["counting"]
    sampler = new_sampler(rows, data(**options), 1)
    sampler.observe([])
    kept = sampler.state()
    before = json.dumps(kept)
    sampler.observe([])
    assert json.dumps(kept) == before
    assert sampler.state()["curriculum"]["deep"] == {"steps": [0, 1, 2]}


def test_measured_pools_take_other_borders() -> None:
    """A prompt's rewards are kept, not its pool."""
    rows = prompts(12)
    options = {"borders": [0.1, 0.9], "weights": [0, 0, 1, 0]}
    sampler = new_sampler(rows, data(pools=options), 2)
    sampler.observe([(prompt, prompt.index / 11) for prompt in sampler.next(12)])
    again = restored_sampler(rows, data(pools={"borders": [0.5], "weights": [0, 0, 1]}), 2, sampler.state())
    assert {prompt.index for prompt in again.next(60)} == set(range(6, 12))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_names", r"gave weights for \['x'\]; needed: for \['easy', 'hard', 'train'\]"),
        ("nothing", "not all of them 0"),
        ("negative", "gave {'hard': -1.0}"),
        ("unkept", "its state cannot be kept in a checkpoint"),
        ("unread", "its state cannot be kept in a checkpoint"),
        ("raising", r"failed when 0 steps were made: KeyError: 'the plan' \(.*curricula.py, line \d+\)"),
        ("none", "gave a NoneType; needed: a weight by the name of each"),
        ("numbered", r"gave weights for \['1', 'x'\]; needed: for"),
        ("not_a_number", "gave {'hard': nan}"),
        ("words", "gave {'hard': 'often'}; weights are numbers"),
        ("too_much", "weights are numbers from 0 on, finite"),
    ],
)
def test_a_curriculum_that_cannot_be_used_is_named(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        new_sampler(ALL, data(mixture=MIXTURE, curriculum=f"{HERE}:{name}"), 1)


def test_what_is_no_function_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken_curriculum.py"
    broken.write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path, words in (
        ("broken_curriculum:f", "its module cannot be loaded: ZeroDivisionError"),
        (".curricula:f", "cannot be loaded"),
        (f"{HERE}:missing", "missing"),
        ("no.such:thing", "PYTHONPATH"),
        (f"{HERE}:NUMBER", "is a int"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_curriculum(path)


def test_other_sources_and_other_prompts_are_refused() -> None:
    for form in ("mixture", "measured", "column"):
        options, rows = FORMS[form]
        state = new_sampler(rows, data(**options), 1).state()
        with pytest.raises(DataError, match="changed since the state was saved"):
            restored_sampler(rows[1:], data(**options), 1, state)
        with pytest.raises(DataError, match=r"mixture|changed"):
            restored_sampler(prompts(20), data(), 1, state)
    plain = new_sampler(prompts(20), data(), 1).state()
    with pytest.raises(DataError, match="sources and pools"):
        restored_sampler(ALL, data(mixture=MIXTURE), 1, plain)
    with pytest.raises(DataError, match="source 'easy'"):
        new_sampler(ALL[:50], data(mixture=MIXTURE), 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixture": [{"name": "train", "path": "b"}]}, "a name of its own"),
        ({"mixture": [MIXTURE[0], MIXTURE[0]]}, "a name of its own"),
        ({"pools": {"column": "x", "borders": [1, 0], "weights": [1, 1, 1]}}, "do not ascend"),
        ({"pools": {"borders": [0.5], "weights": [1, 1]}}, "needed: 3 numbers"),
        ({"pools": {"column": "x", "borders": [0.5], "weights": [0, 0]}}, "not all of them 0"),
        ({"curriculum": "nothing"}, "pattern"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data(**options)


def test_the_column_is_read_and_its_rows_are_named(tmp_path: Path) -> None:
    def table(levels: list[Any]) -> Path:
        rows = [
            {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "1"}, "level": level}
            for level in levels
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    found = read_prompts(table([0.5, 2.0]), source="hard", difficulty="level")
    assert [(prompt.key, prompt.difficulty) for prompt in found] == [("hard:0", 0.5), ("hard:1", 2.0)]
    with pytest.raises(DataError, match=r"row 1: 'level' is .*; data.pools.column needs a number there"):
        read_prompts(table([0.5, None]), difficulty="level")
    with pytest.raises(DataError, match="depth"):
        read_prompts(table([0.5]), difficulty="depth")
