"""What is wrong with a file is said before anything starts, all of it at once; other people's exceptions are one sentence."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jinja2 import Environment, TemplateError
from jinja2.exceptions import UndefinedError

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.packing import longest_sample, pack
from ctpo_megatron.data.prompts import check_prompt_lengths, read_prompts
from ctpo_megatron.data.sft import LengthLimit, read_demonstrations
from ctpo_megatron.data.tables import read_rows
from ctpo_megatron.errors import DataError, RenderError
from ctpo_megatron.types import Prompt, TrainSample


class Letters:
    """A token per letter."""

    def prompt_ids(self, messages):
        return list(messages[-1]["content"])

    def demonstration(self, messages, start):
        return [0], [(message["role"], [ord(letter) for letter in message["content"]]) for message in messages[start:]]


def demonstrations(path, *answers):
    talks = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def test_a_demonstration_that_is_too_long_is_named_with_both_numbers(tmp_path):
    path = demonstrations(tmp_path / "s.jsonl", "a" * 10, "a" * 20_000, "a" * 5)
    limit = LengthLimit(16_384, "train.max_tokens_per_micro_batch = 16384")
    with pytest.raises(DataError) as caught:
        read_demonstrations(path, Letters(), limit=limit)
    assert str(caught.value).startswith(
        f"{path} line 2: the demonstration has 20,000 tokens; allowed: train.max_tokens_per_micro_batch = 16384."
    )
    assert len(read_demonstrations(path, Letters(), limit=LengthLimit(20_000, ""))) == 3


def test_all_wrong_rows_are_counted_and_the_first_are_named(tmp_path):
    path = demonstrations(tmp_path / "s.jsonl", "a", "", "a" * 9, *[" "] * 6, "a")
    with pytest.raises(DataError) as caught:
        read_demonstrations(path, Letters(), limit=LengthLimit(8, "the limit = 8"))
    first, *named = str(caught.value).split("\n- ")
    assert first == f"8 of 10 rows of {path} cannot be used; the first of them:"
    assert [re.search(r"line (\d+)", words).group(1) for words in named] == ["2", "3", "4", "5", "6"]
    assert "9 tokens" in named[1]
    assert "not blank" in named[0]


def test_wrong_prompts_are_counted_with_their_duplicates(tmp_path):
    good = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "1"}}
    blank = {"prompt": [{"role": "user", "content": " "}], "reward_model": {"ground_truth": "1"}}
    last = {"prompt": [{"role": "assistant", "content": "a"}], "reward_model": {"ground_truth": "1"}}
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([good, blank, good, last, blank, blank]), path)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"4 of 6 rows of {path} cannot be used; the first of them:\n- {path} row 1: ")
    assert f"\n- {path} row 3: the last message" in str(caught.value)


def test_all_prompts_that_are_too_long_are_counted():
    same = ({"role": "user", "content": "abcd"},)
    prompts = [Prompt(number, same, "1") for number in range(8)] + [Prompt(8, ({"role": "user", "content": "ab"},), "1")]
    check_prompt_lengths(prompts, Letters(), max_tokens=4, path="p.jsonl")
    with pytest.raises(DataError) as caught:
        check_prompt_lengths(prompts, Letters(), max_tokens=3, path="p.jsonl")
    assert "8 of 9 rows are too long, counted from 0: 0 (4 tokens), 1 (4 tokens)" in str(caught.value)
    assert "and 3 more" in str(caught.value)


@pytest.mark.parametrize("sizes", [{}, {"cp": 2}, {"tp": 2}, {"cp": 2, "tp": 2}, {"cp": 4}])
def test_the_longest_sample_is_the_one_that_packs(sizes):
    parallel = ParallelConfig(**sizes)
    longest = longest_sample(parallel, 21)

    def sample(length: int) -> TrainSample:
        return TrainSample([1] * length, [1] * length, [True] * length, [0.0] * length, [0] * length, [1.0] * length)

    pack([sample(longest)], dp=1, max_tokens=21 * parallel.cp, cp=parallel.cp, tp=parallel.tp)
    with pytest.raises(ValueError, match="a micro-batch holds"):
        pack([sample(longest + 1)], dp=1, max_tokens=21 * parallel.cp, cp=parallel.cp, tp=parallel.tp)


class Template(Letters):
    """A chat template that is a program: it may raise what it likes."""

    def __init__(self, source: str) -> None:
        self._source = source

    def prompt_ids(self, messages):
        def refuse(words):
            raise TemplateError(words)

        return list(Environment().from_string(self._source).render(messages=messages, raise_exception=refuse))

    def demonstration(self, messages, start):
        return self.prompt_ids(messages[:start]), [("assistant", [1])]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}"
         "{% endfor %}", "no system messages here"),
        ("{{ messages[1].content + none }}", "cannot write this conversation"),
        ("{{ messages[0].tool_calls[0].name }}", "has no attribute 'tool_calls'"),
        ("{{ messages[0].content / 2 }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "modulo by zero|division"),
        ("{% if x %}", "Unexpected end of template"),
        ("{{ '%d' | format(messages[0].content) }}", "format"),
    ],
)  # fmt: skip
def test_a_template_that_raises_is_told_with_row_and_its_own_words(tmp_path, source, words):
    rows = [{"prompt": [{"role": "user", "content": f"{n}"}], "reward_model": {"ground_truth": "1"}} for n in range(2)]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(path, system_prompt="Answer briefly.")
    with pytest.raises(DataError, match=words) as caught:
        check_prompt_lengths(prompts, Template(source), max_tokens=100, path=path)
    assert str(caught.value).startswith(f"{path} row 0: the model's chat template cannot write this conversation: ")
    assert "data.system_prompt" in str(caught.value)
    talk = demonstrations(tmp_path / "s.jsonl", "a", "b")
    with pytest.raises(DataError, match=words) as caught:
        read_demonstrations(talk, Template(source), system_prompt="Answer briefly.")
    assert f"- {talk} line 1: " in str(caught.value)


def test_the_row_at_fault_is_found_among_those_that_are_counted_together():
    class Batches(Letters):
        def prompt_lengths(self, conversations):
            return [self._length(messages) for messages in conversations]

        def prompt_ids(self, messages):
            return [0] * self._length(messages)

        def _length(self, messages):
            if messages[0]["content"] == "bad":
                raise UndefinedError("'x' is undefined")
            return len(messages[0]["content"])

    prompts = [Prompt(n, ({"role": "user", "content": "bad" if n == 700 else f"{n}"},), "1") for n in range(1000)]
    check_prompt_lengths(prompts[:700], Batches(), max_tokens=3, path="p.jsonl")
    with pytest.raises(DataError, match=r"p.jsonl row 700: .*'x' is undefined"):
        check_prompt_lengths(prompts, Batches(), max_tokens=3, path="p.jsonl")


def test_the_renderers_own_error_gets_its_row(tmp_path):
    class Refusing(Letters):
        def demonstration(self, messages, start):
            raise RenderError("the template leaves out 'tool_calls'")

    path = demonstrations(tmp_path / "s.jsonl", "a")
    with pytest.raises(DataError, match=r"s.jsonl line 1: the template leaves out 'tool_calls'$"):
        read_demonstrations(path, Refusing())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "line 1 is not JSON"),
        (b'{"a": 1}\n{"a": "\xe9"}', "line 2 is not readable as UTF-8"),
    ],
)
def test_what_the_json_reader_raises_is_told_with_its_line(tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(path, ("a",)))
    assert str(path) in str(caught.value)


def test_what_arrow_and_the_system_raise_is_told_with_the_file(tmp_path):
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())  # Arrow does not look whether it is UTF-8
    pq.write_table(pa.table({"a": text}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p.parquet is not a readable parquet file.*utf-8"):
        list(read_rows(tmp_path / "p.parquet", ("a",)))
    with pytest.raises(DataError, match="file name too long"):
        list(read_rows(tmp_path / f"{'x' * 300}.jsonl", ("a",)))
