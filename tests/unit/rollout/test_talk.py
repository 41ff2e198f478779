"""What agents send as tokens, as many families write it: all of it is there, and only the template's tokens are special."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support.agents import ADD, QUESTION
from tests.support.chats import FAMILIES, loader

ALIKE = ["qwen2.5", "qwen3", "llama3", "gemma", "deepseek-v3"]  # whose earlier turns are written as the last one is


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return loader(lambda: tmp_path_factory.mktemp("model") / "m")


def call(number: int, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": "add", "arguments": arguments}}


def said(content: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


def output(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


NEW = {
    "a tool": [output(1, "two")],
    "two tools": [output(1, "two"), output(2, "three")],
    "a user": [user("two")],
    "a tool and a user": [output(1, "two"), user("three")],
    "users": [user("two"), user("three")],
    "a system": [{"role": "system", "content": "two"}, user("three")],
    "somebody's turns": [
        output(1, "two"),
        said("three", call(1, '{"four": 4}'), call(2, '{"five": ')),
        output(1, "six"),
        user("7"),
    ],
}


def end_of(chat: ChatTokenizer) -> int:
    return chat._tokens.ends[chat._end]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("new", NEW)
def test_all_that_is_new_is_written_once_and_the_rest_is_not(chats, name, new):
    chat = chats(name)
    ids = chat.tail_ids(QUESTION, NEW[new], end=end_of(chat), tools=[ADD])
    text = chat.decode(ids, special=True)
    for word in ("two", "three", "four", "five", "six"):
        assert text.count(word) == str(NEW[new]).count(word), text
    assert "1 + 1" not in text
    assert "assistantsays" not in text


@pytest.mark.parametrize("name", FAMILIES)
def test_any_history_becomes_a_prompt(chats, name):
    chat = chats(name)
    history = [*QUESTION, said("I add.", call(1, '{"one": 1}'), call(2, '{"two": ')), output(1, "three"), output(2, "four")]
    text = chat.decode(chat.talk_ids([*history, said("five"), user("six")], tools=[ADD]), special=True)
    for word in ("Be brief.", "I add.", "one", "two", "three", "four", "five", "six"):
        assert text.count(word) == 1, text


@pytest.mark.parametrize("name", ALIKE)
def test_a_talk_of_tails_has_the_tokens_of_the_whole(chats, name):
    chat = chats(name)
    ids, messages = chat.talk_ids(QUESTION), list(QUESTION)
    for number in range(3):
        before = list(messages)
        ids += chat.assistant_ids(f"It is {number}.")
        new = [user(f"And {number}?")]
        ids += chat.tail_ids(before, new, end=end_of(chat))
        messages += [said(f"It is {number}."), *new]
    assert chat.decode(ids, special=True) == chat.decode(chat.talk_ids(messages), special=True)
    assert ids == chat.talk_ids(messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_others_write_stays_plain_text(chats, name):
    chat = chats(name)
    specials = set(chat._tokenizer.all_special_ids)
    names = "".join(chat._tokenizer.all_special_tokens)
    for messages in ([user("x")], [output(1, "x")]):
        plain, loud = ([{**m, "content": text} for m in messages] for text in ("x", names + "\ufdd0"))
        counts = [
            sum(id_ in specials for id_ in chat.tail_ids(QUESTION, each, end=end_of(chat), tools=[ADD])) for each in (plain, loud)
        ]
        assert counts[0] == counts[1]
    loud_tool = {**ADD, "function": {**ADD["function"], "description": names}}
    counts = [sum(id_ in specials for id_ in chat.talk_ids(QUESTION, tools=[tool])) for tool in (ADD, loud_tool)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_was_cut_is_ended(chats, name):
    chat = chats(name)
    plain = next(id_ for id_ in range(100) if id_ not in chat.stop_token_ids)
    whole = chat.tail_ids(QUESTION, [user("two")], end=end_of(chat))
    cut = chat.tail_ids(QUESTION, [user("two")], end=plain)
    assert cut[-len(whole) :] == whole
    assert cut[0] in chat.stop_token_ids or chat.decode(cut, special=True)[0] == "\n"


def test_a_template_that_writes_no_tools_is_told_of_once(chats, caplog):
    chat = chats("gemma", None, plain=("<think>",))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chat.talk_ids(QUESTION, tools=[ADD])
    assert caplog.text.count("does not write tools into the prompt") == 1


def test_a_template_that_writes_nobody_else(chats):
    chat = chats("qwen2.5")
    talk = chat._talk
    source = chat._tokenizer.chat_template
    try:
        chat._tokenizer.chat_template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}"
        talk._chosen.clear()
        with pytest.raises(RenderError, match="does not write all of a conversation of system, user, assistant, tool"):
            chat.tail_ids(QUESTION, [output(1, "two")], end=end_of(chat))
    finally:
        chat._tokenizer.chat_template = source
        talk._chosen.clear()


@pytest.mark.parametrize("name", ["qwen3", "glm4.5"])
def test_thinking_is_turned_off_where_the_template_knows_it(chats, name):
    chat = chats(name)
    new, end = [user("two")], end_of(chat)
    on, off, own = (chat.tail_ids(QUESTION, new, end=end, thinking=value) for value in (True, False, None))
    assert off != on == own
    assert chat.talk_ids(QUESTION, thinking=False) != chat.talk_ids(QUESTION)
