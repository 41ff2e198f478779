"""Prompt files: what is read, and how a wrong file is named; the sampler; the toy task."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.data.prompts import check_prompt_lengths, read_prompts
from ctpo_megatron.data.tables import Table, read_rows
from ctpo_megatron.errors import DataError
from ctpo_megatron.rollout.calculator import calculate
from ctpo_megatron.rollout.tools import extract_code
from ctpo_megatron.toy.task import OPERATIONS, make_toy_task
from ctpo_megatron.types import Prompt
from tests.support.often import often


def row(number: int = 0, **changes: object) -> dict:
    good = {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "reward_model": {"ground_truth": str(number), "style": "rule"},
        "data_source": "test",
        "extra_info": {"index": number},
        "ability": "math",
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_both_formats_give_the_same_prompts(tmp_path, suffix):
    prompts = read_prompts(write(tmp_path / f"p{suffix}", [row(i) for i in range(3)]))
    assert prompts == [Prompt(i, ({"role": "user", "content": f"question {i}"},), str(i)) for i in range(3)]


def test_optional_columns_and_numbers_as_answers(tmp_path):
    bare = row(data_source=..., extra_info=..., ability=..., reward_model={"ground_truth": 7})
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [bare]))
    assert prompt.answer == "7"


def test_the_system_prompt_goes_where_none_is(tmp_path):
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "q"}]
    plain, kept = read_prompts(write(tmp_path / "p.jsonl", [row(), row(prompt=own)]), system_prompt="yours")
    assert plain.messages[0] == {"role": "system", "content": "yours"}
    assert [m["content"] for m in kept.messages] == ["mine", "q"]


def wrong_rows():
    """(what is wrong with the second row, words of the message)"""
    user = {"role": "user", "content": "q"}
    yield {"prompt": ...}, "line 2: no 'prompt'; found: .*required: prompt, reward_model"
    yield {"prompt": ..., "promt": [user]}, "Did you mean 'promt'"
    yield {"reward_model": ...}, "line 2: no 'reward_model'"
    yield {"prompt": []}, r"'prompt' is \[\]; needed: a list"
    yield {"prompt": "question"}, "'prompt' is 'question'; needed: a list"
    yield {"prompt": ["question"]}, r"prompt\[0\] is 'question'"
    yield {"prompt": [{"role": "user"}]}, r"prompt\[0\]: no 'content'"
    yield {"prompt": [{"role": "human", "content": "q"}]}, "role 'human'; allowed: system, user, assistant"
    yield {"prompt": [{"role": "user", "content": " "}]}, "needed: text that is not blank"
    yield {"prompt": [user, {"role": "assistant", "content": "a"}]}, "last message .* must be 'user'"
    yield {"reward_model": "4"}, "'reward_model' is '4'; needed: a struct"
    yield {"reward_model": {"groundtruth": "4"}}, "no 'ground_truth'.*Did you mean 'groundtruth'"
    yield {"reward_model": {"ground_truth": None}}, "'reward_model.ground_truth' is None"
    yield {"reward_model": {"ground_truth": ""}}, "'reward_model.ground_truth' is ''"
    yield {"reward_model": {"ground_truth": True}}, "'reward_model.ground_truth' is True"
    yield {"extra_info": 3}, "'extra_info' is 3"


@pytest.mark.parametrize(("changes", "words"), list(wrong_rows()))
def test_a_wrong_row_is_named(tmp_path, changes, words):
    path = write(tmp_path / "p.jsonl", [row(), row(**changes), row()])
    with pytest.raises(DataError, match=words) as caught:
        read_prompts(path)
    assert f"{path} line 2" in str(caught.value)


def test_a_wrong_parquet_row_is_named(tmp_path):
    path = write(tmp_path / "p.parquet", [row(), row(reward_model={"ground_truth": None, "style": "rule"})])
    with pytest.raises(DataError, match=re.escape(f"{path} row 1: 'reward_model.ground_truth' is None")):
        read_prompts(path)
    path = write(tmp_path / "q.parquet", [row(prompt=..., prompts="x")])
    with pytest.raises(DataError, match=r"no 'prompt'; found: 'reward_model'.*Did you mean 'prompts'"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b'{"a": 1}\n{"a": \n', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", b'{"a": 1}\n\n{"a": 1}\n', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", b"[1]\n", "line 1 is .*needed: one JSON object per line"),
        ("p.jsonl", b"\xff\xfe{", "not readable as UTF-8"),
        ("p.jsonl", b"", "holds no rows"),
        ("p.parquet", b"", "not a readable parquet file"),
        ("p.parquet", b"PAR1 and then nothing", "not a readable parquet file"),
        ("p.csv", b"a,b", "end in '.csv'; allowed: .parquet, .jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(path, ("a",)))
    assert str(path) in str(caught.value)


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = write(tmp_path / "p.parquet", [row(i) for i in range(100)])
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 10):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="not a readable parquet file"):
            read_prompts(path)
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])  # a whole footer over broken pages
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_prompts(path)


def test_a_missing_file_is_named_with_its_near_miss(tmp_path):
    write(tmp_path / "train.jsonl", [row()])
    with pytest.raises(DataError, match=r"trian.jsonl does not exist.*Did you mean 'train.jsonl'"):
        read_prompts(tmp_path / "trian.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        read_prompts(tmp_path / "d.jsonl")


def test_a_long_prompt_is_named():
    class Words:
        def prompt_ids(self, messages):
            return messages[-1]["content"].split()

    prompts = [Prompt(i, ({"role": "user", "content": "word " * i},), "1") for i in range(1, 6)]
    check_prompt_lengths(prompts, Words(), max_tokens=5, path="p.jsonl")
    with pytest.raises(DataError, match=r"p\.jsonl row 4: the prompt has 4 tokens; allowed: data\.max_prompt_tokens = 3"):
        check_prompt_lengths(prompts, Words(), max_tokens=3, path="p.jsonl")


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, ({"role": "user", "content": f"q{i}"},), str(i)) for i in range(count)]


@settings(max_examples=often(60), deadline=None)
@given(
    count=st.integers(1, 20),
    seed=st.integers(0, 5),
    takes=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    cut=st.integers(0, 5),
)
def test_the_stream_does_not_depend_on_how_it_is_cut_or_resumed(count, seed, takes, cut):
    rows = prompts(count)
    whole = [p.index for p in PromptSampler(rows, seed).next(sum(takes))]
    sampler, pieces = PromptSampler(rows, seed), []
    for number, take in enumerate(takes):
        if number == cut:
            sampler = PromptSampler.restore(rows, json.loads(json.dumps(sampler.state())))
        pieces += [p.index for p in sampler.next(take)]
    assert pieces == whole
    for epoch in range(len(whole) // count):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_changes_with_seed_and_epoch():
    one = [p.index for p in PromptSampler(prompts(50), 1).next(100)]
    assert one[:50] != one[50:]
    assert one[:50] != [p.index for p in PromptSampler(prompts(50), 2).next(50)]


def test_a_state_of_other_prompts_is_refused():
    state = PromptSampler(prompts(5), 1).state()
    with pytest.raises(DataError, match="5 rows then, 6 now"):
        PromptSampler.restore(prompts(6), state)
    with pytest.raises(DataError, match="no prompts"):
        PromptSampler([], 1)


def test_the_toy_task_is_right_disjoint_and_repeatable(tmp_path):
    sizes = {"train_rows": 300, "eval_rows": 50, "sft_rows": 200}
    task = make_toy_task(tmp_path / "one", seed=3, **sizes)
    train, held_out = read_prompts(task.train), read_prompts(task.eval)
    demonstrations = [r["messages"] for _, r in read_rows(task.sft, ("messages",))]
    assert (len(train), len(held_out), len(demonstrations)) == (300, 50, 200)

    programs, right = [], 0
    for user, call, tool, answer in demonstrations:
        assert calculate(extract_code(call["content"])) == (True, tool["content"])
        assert answer["content"] == f"\\boxed{{{tool['content']}}}"
        programs.append(call["content"])
        right += asked_for(user["content"]) == re.search(r"\d([*+%])\d", call["content"]).group(1)
        assert 35 <= len(user["content"]) <= 70
    assert 0.2 < right / len(demonstrations) < 0.4  # they teach the format; the task is for the reward to teach
    assert {op.symbol for op in OPERATIONS} == {re.search(r"\d([*+%])\d", p).group(1) for p in programs}

    questions = [p.messages[0]["content"] for p in train + held_out] + [d[0]["content"] for d in demonstrations]
    keys = [tuple(re.findall(r"\d+|[^\d]+", q)) for q in questions]
    assert len(set(keys)) == len(keys)

    again = make_toy_task(tmp_path / "two", seed=3, **sizes)
    assert read_prompts(again.train) == train
    assert read_prompts(make_toy_task(tmp_path / "three", seed=4, **sizes).train) != train
    with pytest.raises(ValueError, match="eval_rows=0; allowed: 1 to"):
        make_toy_task(tmp_path, seed=1, train_rows=1, eval_rows=0)


def asked_for(question: str) -> str:
    """The operation that a problem's words alone ask for."""
    meaning = {"rows|box holds|a day": "*", "more|in all|get on": "+", "crates|parts|Deal": "%"}
    (symbol,) = [s for words, s in meaning.items() if re.search(words, question)]
    return symbol


def test_toy_answers_follow_from_the_words(tmp_path):
    """Each template, read by its words alone, asks for its operation; answers are Python's."""
    for prompt in read_prompts(make_toy_task(tmp_path, seed=1, train_rows=200, eval_rows=1, sft_rows=1).train):
        question = prompt.messages[0]["content"]
        symbol = asked_for(question)
        a, b = re.findall(r"\d{3}", question)
        assert calculate(f"print({a}{symbol}{b})") == (True, prompt.answer)


@pytest.mark.parametrize("groups", [1, 3, 1000])
@pytest.mark.parametrize("at_once", [2, 4, 1 << 17])
def test_row_groups_of_any_size_give_the_same_rows(tmp_path, groups, at_once):
    """Each row group has a dictionary of texts of its own, and Arrow cannot join those of nested columns."""
    rows = [row(number % 7) for number in range(40)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=groups)
    table = Table(path, ("prompt", "reward_model"), at_once=at_once)
    found = [batch.rows[number] for batch in table.batches() for number in batch.numbers.tolist()]
    assert [each["prompt"] for each in found] == [each["prompt"] for each in rows]
    assert [prompt.answer for prompt in read_prompts(path)] == [str(number % 7) for number in range(40)]


GOOD = '{"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (GOOD + ', "prompt": []}', "p.jsonl line 2 gives the key 'prompt' twice in one object; needed: once"),
        (GOOD.replace('"1"', '"1", "ground_truth": "2"') + "}", "line 2 gives the key 'ground_truth' twice"),
        (GOOD.replace('"a"', '"a", "content": "b"') + "}", "line 2 gives the key 'content' twice"),
        (GOOD.replace('"a"', r'"\ud83d"') + "}", r"line 2 holds '\ud83d', half of a character, which is no text"),
        (GOOD.replace('"1"', r'"1\uDC00"') + "}", r"line 2 holds '\udc00', half of a character"),
        (GOOD + "},", "line 2 is not JSON: Extra data (character 86); found"),
        ("[", "line 2 is not JSON: Expecting value (character 3); found '['; needed: one JSON object per line"),
        ("", "line 2 is not JSON: it is blank; needed: one JSON object per line"),
    ],
)
def test_a_line_that_says_two_things_or_nothing_is_named(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{GOOD}}}\n{line}\n{GOOD}}}\n")
    with pytest.raises(DataError, match=re.escape(words)):
        read_prompts(path)


def test_a_whole_surrogate_pair_and_its_words_are_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD.replace('"a"', r'"\ud83d\ude00 \\ud83d"') + "}\n")
    assert read_prompts(path)[0].messages[0]["content"] == "\U0001f600 \\ud83d"


def test_a_byte_order_mark_is_called_by_its_name(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD + "}\n", encoding="utf-8-sig")
    with pytest.raises(DataError, match=r"line 1 is not JSON: a byte order mark stands before it\. Save the file"):
        read_prompts(path)


def test_a_column_that_is_there_twice_is_named(tmp_path):
    table = pa.Table.from_pylist([row(1)]).select(["prompt", "reward_model"])
    twice = pa.Table.from_arrays([*table.columns, table["reward_model"]], [*table.column_names, "reward_model"])
    pq.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet has 2 columns 'reward_model'; needed: one"):
        read_prompts(tmp_path / "p.parquet")
