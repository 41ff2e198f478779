"""Nothing that a file holds is dropped in silence: refused with row and column, passed on, or named as not used."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.data.distinct import first_places, row_numbers
from ctpo_megatron.data.messages import KEYS, check_messages
from ctpo_megatron.data.prompts import read_prompts
from ctpo_megatron.data.sft import read_demonstrations
from ctpo_megatron.errors import DataError
from ctpo_megatron.record.events import DataRead
from tests.support.often import often


def row(number: int = 0, **more: object) -> dict:
    prompt = [{"role": "user", "content": f"question {number}"}]
    return {"prompt": prompt, "reward_model": {"ground_truth": str(number), "style": "rule"}} | more


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


FILE = {"bytes": b"\x89PNG", "path": "a.png"}


@pytest.mark.parametrize(
    ("column", "empty", "full", "kind"),
    [
        ("images", [], [FILE], "images"),  # as verl stores geometry problems
        ("image", None, FILE, "images"),
        ("image_path", "", "a/b.png", "images"),
        ("img_1", None, "a.png", "images"),
        ("questionImage", None, "a.png", "images"),
        ("problem_images", None, ["a.png"], "images"),
        ("audio", None, {"array": [0.5, 0.25], "sampling_rate": 16000}, "sounds"),
        ("video_url", None, "https://example.org/a.mp4", "videos"),
        ("multi_modal_data", {"image": []}, {"image": ["a.png"]}, "media"),
        ("sheet", None, b"%PDF", "bytes"),
        ("attachment", None, [FILE], "images, sounds or other files"),
        ("extra_info", {"index": 1, "images": []}, {"index": 2, "images": ["a.png"]}, "images"),
        ("tools", [], [{"type": "function", "function": {"name": "python"}}], "definitions of tools"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_columns_that_the_model_would_have_to_see(tmp_path, column, empty, full, kind, suffix):
    if suffix == ".jsonl" and "bytes" in repr(type(full)) + repr(full):
        full = {"bytes": "iVBORw0=", "path": "a.png"}
        kind = kind if kind == "images" else "images, sounds or other files"
    path = write(tmp_path / f"p{suffix}", [row(0, **{column: empty}), row(1, **{column: full}), row(2, **{column: full})])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    place = f"{path} row 1" if suffix == ".parquet" else f"{path} line 2"
    assert str(caught.value).startswith(f"{place}: column {column!r} holds {kind}, which ")
    nothing = write(tmp_path / f"none{suffix}", [row(0, **{column: empty}), row(1, **{column: empty})])
    assert len(read_prompts(nothing)) == 2


def test_the_geometry_problem_of_the_report(tmp_path):
    """Trained on without its picture, it would be the text `<image>What is the angle?` alone."""
    messages = [{"role": "user", "content": "<image>What is the angle?"}]
    path = write(tmp_path / "geo.parquet", [row(prompt=messages, images=[FILE], data_source="geo", extra_info={"index": 0})])
    with pytest.raises(DataError, match=r"geo.parquet row 0: column 'images' holds images, which the model cannot see"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("has_image", True),
        ("image_count", 2),
        ("image_license", "MIT"),
        ("part_of_speech", "noun"),
        ("ability", "math"),
        ("imagery", "vivid"),
        ("level", 3),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_columns_that_are_not_used_are_named_once(tmp_path, column, value, suffix):
    told = []
    read_prompts(write(tmp_path / f"p{suffix}", [row(n, **{column: value}, data_source="x") for n in range(3)]), emit=told.append)
    (event,) = told
    assert isinstance(event, DataRead)
    assert set(event.ignored) == {column, "data_source"}
    assert column in event.sentence


def test_duplicates_are_counted_and_share_their_messages(tmp_path):
    told = []
    rows = [row(number % 3, extra_info={"index": number}) for number in range(12)]
    for suffix in (".parquet", ".jsonl"):
        prompts = read_prompts(write(tmp_path / f"p{suffix}", rows), emit=told.append)
        assert [prompt.index for prompt in prompts] == list(range(12))
        assert [prompt.answer for prompt in prompts] == [str(number % 3) for number in range(12)]
        assert len({id(prompt.messages) for prompt in prompts}) == 3
    assert {(event.rows, event.different) for event in told} == {(12, 3)}
    assert "12 rows, 3 different ones: each 4.0 times on average" in told[0].sentence


cells = st.one_of(st.none(), st.sampled_from(["a", "b", ""]))
structs = st.one_of(st.none(), st.fixed_dictionaries({"role": cells, "number": st.one_of(st.none(), st.integers(0, 2))}))


@settings(max_examples=often(80), deadline=None)
@given(rows=st.lists(st.tuples(st.one_of(st.none(), st.lists(structs, max_size=3)), structs, cells), min_size=1, max_size=12))
def test_rows_have_the_same_number_exactly_where_they_are_the_same(rows):
    inner = pa.struct([("role", pa.string()), ("number", pa.int64())])
    types = (pa.list_(inner), inner, pa.string())
    columns = [pa.array([each[i] for each in rows], kind) for i, kind in enumerate(types)]
    for arrays in (columns, [column.slice(1) for column in columns]):  # a slice has an offset
        expected = list(zip(*(column.to_pylist() for column in arrays), strict=True))  # keys in the order of the type
        numbers = row_numbers(arrays)
        seen: dict[str, int] = {}
        assert numbers.tolist() == [seen.setdefault(repr(each), len(seen)) for each in expected]
        assert [repr(expected[place]) for place in first_places(numbers)] == list(seen)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": "a", "reasoning": "r"}, r"messages\[1\] has the key 'reasoning'"),
        ({"role": "assistant", "content": "a", "toolcalls": [1]}, "Did you mean 'tool_calls'"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "has the key 'weight'"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "has the key 'function_call'"),
        ({"role": "user", "content": "a", "images": ["a.png"]}, "has the key 'images'"),
        ({"role": "user", "content": "a", "reasoning_content": "r"}, "its role is 'user'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": "x"}]},
            r"content\[1\]",
        ),
        ({"role": "user", "content": [{"type": "image"}]}, r"content\[0\] is .*text alone"),
        ({"role": "user", "content": ["plain"]}, r"content\[0\] is 'plain'"),
        ({"role": "user", "content": []}, "not blank"),
        ({"role": "assistant", "content": None}, "not blank"),
    ],
)
def test_what_a_message_cannot_pass_on_is_refused_with_row_and_key(tmp_path, message, words):
    path = write(
        tmp_path / "s.jsonl", [{"messages": [USER, {"role": "assistant", "content": "a"}]}, {"messages": [USER, message]}]
    )
    with pytest.raises(DataError, match=words) as caught:
        read_demonstrations(path, Echo())
    assert str(caught.value).startswith(f"{path} line 2: messages[1]")


CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "print(3+4)"}}}


class Echo:
    """Keeps the messages that it is given."""

    def __init__(self) -> None:
        self.given = []

    def demonstration(self, messages, start):
        self.given.append(list(messages))
        return [1, 2], [(message["role"], [3, 4]) for message in messages[start:]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_whole_message_reaches_the_renderer(tmp_path, suffix):
    talk = [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "I compute.", "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "python"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "7"}]},
    ]
    if suffix == ".parquet":  # one type for a column
        talk[-1] = {"role": "assistant", "content": "It is 7", "name": None}
    echo = Echo()
    read_demonstrations(write(tmp_path / f"s{suffix}", [{"messages": talk}]), echo)
    ((question, first, tool, last),) = echo.given
    assert question == USER
    assert first == {"role": "assistant", "content": "", "reasoning_content": "I compute.", "tool_calls": [CALL]}
    assert tool == {"role": "tool", "content": "7", "tool_call_id": "1", "name": "python"}
    assert last == {"role": "assistant", "content": "It is 7"}


def test_keys_that_are_absent_in_parquet_are_not_null_arguments(tmp_path):
    """A column has one struct type, so Arrow gives each call the arguments of all, the foreign ones as null."""
    other = {"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in (CALL, other)]
    echo = Echo()
    read_demonstrations(write(tmp_path / "s.parquet", rows), echo)
    assert [messages[1]["tool_calls"] for messages in echo.given] == [[CALL], [other]]


@given(content=st.text(min_size=1).filter(str.strip), extra=st.sampled_from(KEYS[2:]))
def test_messages_are_passed_on_as_they_are(content, extra):
    messages = [USER, {"role": "assistant", "content": content, extra: "x"}]
    assert check_messages("here", "messages", messages, ("user", "assistant")) == tuple(messages)
