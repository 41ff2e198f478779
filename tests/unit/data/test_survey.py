"""What a file is like as a whole: lengths, repetitions, contradictions, and what its columns make it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.data.kind import kind_of
from ctpo_megatron.data.survey import Lengths, find_repeats, find_shared
from ctpo_megatron.types import Prompt


def asked(index: int, question: str, answer: str = "1", **keys: str) -> Prompt:
    return Prompt(index, ({"role": "user", "content": question, **keys},), answer)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=300))
def test_a_percentile_is_the_least_length_that_so_many_do_not_exceed(lengths):
    found = Lengths.of(lengths)
    for percent, size in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert size in lengths
        assert 100 * sum(length <= size for length in lengths) >= percent * len(lengths)
        assert 100 * sum(length < size for length in lengths) < percent * len(lengths)
    assert (found.least, found.most, found.total) == (min(lengths), max(lengths), sum(lengths))
    assert found.mean == pytest.approx(sum(lengths) / len(lengths))


def test_rows_that_ask_the_same_are_counted_also_where_they_share_no_object():
    found = find_repeats([asked(0, "a"), asked(1, "b"), asked(2, "a"), asked(3, "a"), asked(4, "a", name="x")])
    assert (found.different, found.most, found.most_row, found.contradictions) == (3, 3, 0, ())


def test_shared_conversations_are_the_same_question():
    same = asked(0, "a").messages
    assert find_repeats([Prompt(0, same, "1"), Prompt(1, same, "1")]).different == 1


def test_a_question_with_two_answers_is_told_once_with_both_rows():
    prompts = [asked(0, "a"), asked(1, "b"), asked(2, "a"), asked(3, "a", "2"), asked(4, "a", "3"), asked(5, "b", "2")]
    assert find_repeats(prompts).contradictions == ((0, 3), (1, 5))


def test_held_out_rows_that_are_trained_on():
    trained = [asked(0, "a"), asked(1, "b"), asked(2, "b")]
    assert find_shared([asked(0, "c"), asked(1, "b", "9"), asked(2, "a")], trained) == [(1, "1"), (2, "0")]
    assert find_shared([asked(0, "c")], trained) == []


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("messages",), "sft"),
        (("messages", "prompt"), "sft"),
        (("prompt", "reward_model"), "train"),
        (("messages", "prompt", "reward_model"), "train"),
        (("question", "answer"), "train"),
    ],
)
def test_columns_tell_what_a_file_is_for(tmp_path, columns, kind):
    row = dict.fromkeys(columns, "x")
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert kind_of(tmp_path / "a.jsonl") == kind_of(tmp_path / "a.parquet") == kind


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, None])
def test_files_that_cannot_be_read_are_left_to_their_reader(tmp_path, content):
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert kind_of(tmp_path / name) == "train"
