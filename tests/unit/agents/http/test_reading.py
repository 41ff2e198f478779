"""Histories as harnesses write them come into one form; what is not understood is refused, with its place."""

from __future__ import annotations

from typing import Any

import pytest

from ctpo_megatron.agents.http.anthropic_reading import read_history
from ctpo_megatron.agents.http.bodies import decoded
from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.http.openai_messages import read_messages, read_tools
from ctpo_megatron.agents.http.refusals import Refusal

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"}, "user ab"),
        ({"role": "user", "content": ["a", "b"]}, "user ab"),
        ({"role": "assistant"}, {"role": "assistant", "content": None}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": None}),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        ({"role": "assistant", "content": "x", "token_ids": [1], "tool_calls": None}, {"role": "assistant", "content": "x"}),
        (
            {"role": "assistant", "content": [], "tool_calls": [CALL]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}]},
            {"role": "assistant", "content": "x", "reasoning_content": "t"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "t"},
            {"role": "assistant", "content": "x", "reasoning_content": "t"},
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": None, "function": {"name": "f", "arguments": {"a": 1}}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
            },
        ),
        ({"role": "tool", "content": [{"type": "text", "text": "x"}]}, {"role": "tool", "content": "x", "tool_call_id": ""}),
    ],
)
def test_openai_messages(written: dict[str, Any], read: Any) -> None:
    expected = {"role": "user", "content": "ab"} if read == "user ab" else read
    assert read_messages([written]) == (expected,)


def test_calls_in_the_old_style_are_tied_to_what_answers_them() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "not json"}}
    call, result = read_messages([old, {"role": "function", "name": "f", "content": "x"}])
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": "not json"}
    assert result["tool_call_id"] == call["tool_calls"][0]["id"] != ""


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"role": "critic", "content": "x"}, r"messages\[0\]\.role is one of system, .*not 'critic'"),
        ({"content": "x"}, r"messages\[0\]\.role"),
        ({"role": ["user"], "content": "x"}, r"messages\[0\]\.role"),
        ({"role": "user", "content": 3}, r"messages\[0\]\.content is text or a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"content\[0\]: .*'image_url'.*send text"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, r"content\[0\]: "),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"content\[0\]"),
        ({"role": "assistant", "tool_calls": {}, "content": [7]}, r"content\[0\]"),
        ({"role": "assistant", "tool_calls": ["x"]}, r"tool_calls\[0\] is a call"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, r"tool_calls\[0\] is a call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}, r"function.name is text"),
        ({"role": "tool", "tool_call_id": 1}, r"tool_call_id is text"),
    ],
)
def test_openai_messages_that_are_refused(written: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read_messages([written])


@pytest.mark.parametrize("tools", [{}, ["x"], [{"type": "web_search"}], [{"type": "function", "name": "flat"}]])
def test_tools_that_are_refused(tools: Any) -> None:
    with pytest.raises(Refusal, match="tools"):
        read_tools(tools)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, r"content\[0\]: .*redacted_thinking"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "document"}]}, r"content\[1\]: .*document"),
        ({"role": "user", "content": [{"type": "tool_result"}]}, r"content\[0\]\.tool_use_id"),
        ({"role": "user", "content": [{"type": ["x"]}]}, r"content\[0\]"),
        ({"role": "assistant", "content": [{"type": "tool_use"}]}, r"content\[0\] is a tool_use"),
        ({"role": "user", "content": ["x"]}, r"content\[0\] is an object"),
        ({"role": "tool", "content": "x"}, r"role is one of"),
    ],
)
def test_anthropic_messages_that_are_refused(written: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read_history(None, [written])


def test_the_result_of_a_tool_may_be_text_blocks_or_nothing() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"type": "tool_result", "tool_use_id": "b", "is_error": True},
    ]
    read = read_history([{"type": "text", "text": "s"}], [{"role": "user", "content": results}])
    assert [(each["role"], each["content"]) for each in read] == [("system", "s"), ("tool", "xy"), ("tool", "")]


def test_the_digest_is_of_the_values_and_not_of_how_they_are_written_or_brought() -> None:
    limits = Limits()
    one = decoded(b'{"a": {"x": 1, "y": [1, 2]}, "b": "\\u00fc"}', limits).digest
    assert decoded('{"b":"ü","a":{"y":[1,2],"x":1},"stream":true,"stream_options":null}'.encode(), limits).digest == one
    assert decoded('{"b":"ü","a":{"y":[2,1],"x":1}}'.encode(), limits).digest != one


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b'{"a": NaN}', 400, "not JSON"),
        (b'"\xff"', 400, "not JSON"),
        (b"[]", 400, "a JSON object, not list"),
        (b"[" * 9_000, 400, "nested at most 3 deep"),
        (b"[" * 10_001, 413, "at most 10,000 opening brackets"),
        (b'{"a": [[{"b": 1}]]}', 400, "nested at most 3 deep"),
        (b'{"a": [' + b"1," * 100_001 + b"1]}", 413, "and 100,000 commas"),
    ],
)
def test_bodies_that_are_refused(raw: bytes, status: int, words: str) -> None:
    with pytest.raises(Refusal, match=words) as caught:
        decoded(raw, Limits(nesting=3, brackets=10_000, commas=100_000))
    assert caught.value.status == status


def test_a_body_may_be_as_deep_as_the_bound() -> None:
    assert decoded(b'{"a": [[1]]}', Limits(nesting=3)).values == {"a": [[1]]}
