"""Calls of tools in what a model wrote: SGLang's own detectors decide, and nothing that they cannot use is lost.

`test_the_bridge_is_still_needed` fails where a release of SGLang no longer does what engine/sglang/parsers.py bridges.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.engine.sglang.parsers import SGLangCallParser
from ctpo_megatron.types import Parsed, ParsedCall
from tests.support.often import often


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("add", a="integer", b="integer"), tool("write", text="string")]
FORMS = ("hermes", "qwen25", "qwen3_coder", "llama3")
ADD, WRITE = {"a": 1, "b": 2}, {"text": "x"}


@cache
def parser(form: str, thinks: bool = False) -> SGLangCallParser:
    return SGLangCallParser(form, thinks=thinks)


@cache
def theirs(form: str) -> Any:
    """SGLang's parser of a whole turn."""
    parser(form)  # it hides kernels, and quiets SGLang
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return FunctionCallParser([Tool.model_validate(each) for each in TOOLS], form)


def written(form: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as a model writes it in a format."""
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    if form == "hermes":
        return f"<tool_call>{text}</tool_call>"
    if form == "qwen25":
        return f"<tool_call>\n{text}\n</tool_call>"
    if form == "llama3":
        return f"<|python_tag|>{text}"
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


def read(parsed: Parsed) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in parsed.calls]


@pytest.mark.parametrize("form", FORMS)
def test_parallel_calls_and_the_text_around_them(form: str) -> None:
    calls = written(form, "add", ADD) + (";" if form == "llama3" else "\n") + written(form, "write", WRITE)
    parsed = parser(form).parse(f"I begin.\n{calls}", TOOLS)
    assert (parsed.content, read(parsed)) == ("I begin.", [("add", ADD), ("write", WRITE)])
    _, sglangs = theirs(form).parse_non_stream(f"I begin.\n{calls}")
    assert [(call.name, json.loads(call.parameters)) for call in sglangs] == read(parsed)


@pytest.mark.parametrize("form", FORMS)
def test_text_without_a_call_stays_as_it_is(form: str) -> None:
    for text in ("", " 3 < 4\n", "<tool_call>", "<|python_tag|>", "{", "<tool_call>\n</tool_call> and <|python_tag|>print(1)\n"):
        assert parser(form).parse(text, TOOLS) == Parsed(text)
    assert parser(form).parse(written(form, "add", ADD), []) == Parsed(written(form, "add", ADD))


@pytest.mark.parametrize("form", FORMS)
def test_an_unusable_call_stays_content_and_the_others_are_calls(form: str) -> None:
    unknown, good = written(form, "fly", {"to": "Mars"}), written(form, "add", ADD)
    gap = ";" if form == "llama3" else " then "
    parsed = parser(form).parse(f"{good}{gap}{unknown}", TOOLS)
    assert read(parsed) == [("add", ADD)]
    assert parsed.content == (gap + unknown).strip()
    if form != "qwen3_coder":
        broken = good.replace('"b": 2', '"b": ')
        parsed = parser(form).parse(f"{broken}{gap}{good}", TOOLS)
        assert read(parsed) == [("add", ADD)]
        assert parsed.content.startswith(broken)


@pytest.mark.parametrize("form", ["hermes", "qwen25", "llama3"])
@pytest.mark.parametrize(
    "arguments",
    ["[1]", '"text"', "null", "3", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', '{} , "parameters": {}'],
)
def test_what_would_lose_some_of_its_arguments_stays_content(form: str, arguments: str) -> None:
    text = written(form, "add", {}).replace("{}", arguments)
    assert parser(form).parse(text, TOOLS) == Parsed(text)


@pytest.mark.parametrize("form", ["hermes", "qwen25", "llama3"])
def test_arguments_are_the_text_that_the_model_wrote(form: str) -> None:
    spaced = '{ "b":2,"a" : 1.50e0 , "c": {"d": ["\\u00e9", "é"]} }'
    parsed = parser(form).parse(written(form, "add", {}).replace("{}", spaced), TOOLS)
    assert parsed.calls == (ParsedCall("add", spaced),)


@pytest.mark.parametrize("form", ["hermes", "qwen25", "llama3"])
def test_a_call_within_the_arguments_of_a_call_is_text(form: str) -> None:
    inner = f"a call is {written(form, 'add', ADD)}; {{}} and </tool_call>"
    parsed = parser(form).parse(written(form, "write", {"text": inner, "deep": {"name": "add", "arguments": {}}}), TOOLS)
    assert parsed.content == ""
    assert read(parsed) == [("write", {"text": inner, "deep": {"name": "add", "arguments": {}}})]


def test_llamas_calls_as_json_as_python_and_as_prose() -> None:
    llama = parser("llama3")
    bare = '{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}'
    assert read(llama.parse(bare, TOOLS)) == [("add", ADD)]
    assert read(llama.parse(f"{bare}; {bare}\n", TOOLS)) == [("add", ADD)] * 2
    assert read(llama.parse("<|python_tag|>{'name': 'write', 'parameters': {'text': None}}", TOOLS)) == [
        ("write", {"text": None})
    ]
    for text in (
        "<|python_tag|>5",
        '{"answer": 5}',
        "<|python_tag|>[1]",
        "<|python_tag|>{'name': 'write', 'why': 'x'}",
        f"so {bare}",
    ):
        assert llama.parse(text, TOOLS) == Parsed(text)
    assert llama.parse(f"{bare} I hope", TOOLS).content == "I hope"


def test_a_list_of_calls_and_a_call_without_its_end() -> None:
    call = json.dumps({"name": "add", "arguments": ADD})
    assert read(parser("hermes").parse(f"<tool_call>[{call}, {call}]</tool_call>", TOOLS)) == [("add", ADD)] * 2
    assert read(parser("hermes").parse(f"<tool_call>{call}\n", TOOLS)) == [("add", ADD)]
    assert parser("qwen25").parse(f"<tool_call>\n{call}", TOOLS) == Parsed(f"<tool_call>\n{call}")
    mixed = f'<tool_call>[{call}, {{"name": "fly"}}]</tool_call>'
    assert parser("hermes").parse(mixed, TOOLS) == Parsed(mixed)


def test_elements_of_qwen3_coder() -> None:
    coder = parser("qwen3_coder")
    two = "<tool_call>\n<function=write>\n<parameter=text>\na\n\nb < c\n</parameter>\n</function>\n</tool_call>"
    assert read(coder.parse(two, TOOLS)) == [("write", {"text": "a\n\nb < c"})]
    for text in (
        two.replace("</parameter>", ""),
        two.replace("</function>", "lost </function>"),
        two.replace("</parameter>", "</parameter>\n<parameter=text>\nagain\n</parameter>"),
    ):
        assert coder.parse(text, TOOLS) == Parsed(text)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nwhy\n</think>\n\nso", "why", "so"),
        ("why\n</think>\n\nso", "why", "so"),  # the template opened it
        ("<think>\nwhy <tool_call>", "why <tool_call>", ""),
        ("<think>\n\n</think>\n\nso", "", "so"),
        ("so <think>x</think>", None, "so <think>x</think>"),
        ("so", None, "so"),
    ],
)
def test_reasoning(text: str, reasoning: str | None, content: str) -> None:
    assert parser("hermes", thinks=True).parse(text, TOOLS) == Parsed(content, reasoning)
    assert parser("hermes").parse(text, TOOLS) == Parsed(text)


def test_a_call_in_the_reasoning_is_no_call() -> None:
    call = written("hermes", "add", ADD)
    parsed = parser("hermes", thinks=True).parse(f"<think>{call}</think>{call}", TOOLS)
    assert (parsed.reasoning, parsed.content, read(parsed)) == (call, "", [("add", ADD)])


def test_tools_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="function"):
        parser("hermes").parse("", [{"name": "add"}])
    with pytest.raises(ValueError, match="allowed: hermes, qwen25, qwen3_coder, llama3"):
        SGLangCallParser("fluent")


PIECES = ["<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", "[", "]", '"', "'", ":", ",", ";", "\n", " ", "x", "\\", "5"]
CALLS = st.sampled_from([written(form, name, given) for form in FORMS for name, given in (("add", ADD), ("fly", ADD))])


@settings(max_examples=often(60), deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), CALLS), max_size=12).map("".join))
def test_every_word_is_in_the_content_or_in_a_call(text: str) -> None:
    for form in FORMS:
        parsed = parser(form).parse(text, TOOLS)
        assert parsed.content.count("x") + parsed.content.count("5") == text.count("x") + text.count("5")
        assert parsed.content.count("add") + parsed.content.count("fly") + len(parsed.calls) == text.count("add") + text.count(
            "fly"
        )


def test_the_bridge_is_still_needed() -> None:
    """What SGLang 0.5.23 loses. Where this fails, read engine/sglang/parsers.py: part of it may go."""
    unknown = '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'
    assert theirs("qwen25").parse_non_stream(unknown) == ("", [])
    text, calls = theirs("qwen25").parse_non_stream(f"a {written('qwen25', 'add', ADD)} b {written('qwen25', 'add', ADD)} c")
    assert (text, len(calls)) == ("a", 2)
    _, calls = theirs("hermes").parse_non_stream(f"{written('hermes', 'add', ADD)} b <tool_call>{{</tool_call>")
    assert calls == []
    _, calls = theirs("hermes").parse_non_stream(written("hermes", "write", {"text": "</tool_call>"}))
    assert calls == []
    with pytest.raises(AttributeError):
        theirs("llama3").parse_non_stream("<|python_tag|>5")
    assert theirs("llama3").parse_non_stream('{"answer": 5}') == ("", [])
    text, calls = theirs("qwen3_coder").parse_non_stream(written("qwen3_coder", "fly", {}) + " c")
    assert (text, [call.name for call in calls]) == ("", ["fly"])
