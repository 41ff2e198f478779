"""The word problems of the example: right answers, no question twice, the same rows for the same seed, and what a run reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_problems import KINDS, SUMS, Files, steps, value, worked_out, write

from ctpo_megatron.data.prompts import read_prompts
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.rewards.math import quick_verdict
from tests.support.often import often

# by kind: numbers in the order of its text, and the answer that a person gives
ANSWERS = {
    "find": ((8, 11), 19),
    "shelf": ((20, 5), 25),
    "older": ((29, 10), 39),
    "give": ((28, 12), 16),
    "rope": ((36, 11), 25),
    "fewer": ((13, 11), 2),
    "rows": ((7, 9), 63),
    "price": ((9, 2), 18),
    "days": ((5, 8), 40),
    "share": ((24, 6), 4),
    "boxes": ((96, 12), 8),
    "speed": ((56, 8), 7),
    "eat": ((4, 7, 25), 3),
    "taxi": ((9, 9, 18), 99),
    "riders": ((20, 9, 5), 24),
    "teams": ((3, 21, 3), 8),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write(tmp_path_factory.mktemp("problems"), seed=1, train_rows=512, eval_rows=320, sft_rows=480)


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def asked(path: Path) -> list[str]:
    return [(row.get("prompt") or row["messages"])[0]["content"] for row in rows(path)]


def test_every_kind_asks_for_the_sum_that_its_text_means() -> None:
    assert {kind.name: value(kind.sum.format(*ANSWERS[kind.name][0])) for kind in KINDS} == {
        name: answer for name, (_, answer) in ANSWERS.items()
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 + 11", "8 + 11 = 19. \\boxed{19}"),
        ("6 * 4 - 5", "6 * 4 = 24, 24 - 5 = 19. \\boxed{19}"),
        ("(3 + 21) / 3", "3 + 21 = 24, 24 / 3 = 8. \\boxed{8}"),
        ("2 + 3 - 5", "2 + 3 = 5, 5 - 5 = 0. \\boxed{0}"),
    ],
)
def test_a_sum_is_worked_out_step_by_step(text: str, expected: str) -> None:
    assert worked_out(text) == expected


def test_a_division_with_a_remainder_is_refused() -> None:
    with pytest.raises(ValueError, match="7 / 2 is not a whole number"):
        steps("3 + 4 / 2")


@settings(max_examples=often(20), deadline=None)
@given(seed=st.integers(0, 2**32))
def test_answers_are_whole_numbers_that_are_not_negative(seed: int) -> None:
    import random

    rng = random.Random(seed)
    for kind in (*KINDS, *SUMS):
        done = steps(kind.sum.format(*kind.draw(rng)))
        assert min(step.result for step in done) >= 0, kind.name
        assert max(step.result for step in done) < 120, kind.name


def test_no_question_occurs_twice(files: Files) -> None:
    questions = [question for path in files for question in asked(path)]
    assert len(questions) == 512 + 320 + 480
    assert [question for question, count in Counter(questions).items() if count > 1] == []


def test_every_kind_has_the_same_share_and_they_are_mixed(files: Files) -> None:
    for path, each in ((files.eval, 20), (files.train, 32)):
        sources = [row["data_source"] for row in rows(path)]
        assert Counter(sources) == {f"word-problems/{kind.name}": each for kind in KINDS}
        assert len(set(sources[:8])) > 2
        assert sources != sources[: len(KINDS)] * each


def test_a_quarter_of_the_demonstrations_are_word_problems_of_every_kind(files: Files) -> None:
    plain = [question for question in asked(files.sft) if question.startswith("What is ")]
    assert len(plain) == 360


def test_demonstrations_end_with_what_the_reward_takes(files: Files) -> None:
    for row in rows(files.sft):
        question, answer = (message["content"] for message in row["messages"])
        box = last_box(answer)
        assert box is not None
        assert answer.endswith(f"= {box}. \\boxed{{{box}}}"), question


def test_a_run_reads_the_prompts(files: Files) -> None:
    prompts = read_prompts(files.eval)
    by_text = {row["prompt"][0]["content"]: row["reward_model"]["ground_truth"] for row in rows(files.eval)}
    assert [prompt.answer for prompt in prompts] == [by_text[prompt.messages[0]["content"]] for prompt in prompts]
    assert all(quick_verdict(prompt.answer, prompt.answer) for prompt in prompts)


def test_the_seed_decides(tmp_path: Path) -> None:
    sizes = {"train_rows": 64, "eval_rows": 32, "sft_rows": 32}
    one, same, other = (write(tmp_path / name, seed=seed, **sizes) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in same]
    assert asked(one.eval) != asked(other.eval)


def test_more_rows_than_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has hardly more questions than it gave"):
        write(tmp_path, seed=1, train_rows=1_000_000, eval_rows=1, sft_rows=1)
