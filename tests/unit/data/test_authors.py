"""Who wrote which part of a rendered conversation, for templates that wrap, trim, quote, merge and move what authors wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.data.authors import Part, Run, parts_of, runs_of


def wrapped(messages):
    return "".join(f"<{message['role']}>{message['content']}<end>\n" for message in messages) + "<assistant>"


def trimmed(messages):
    return wrapped([{**message, "content": message["content"].strip()} for message in messages])


def quoted(messages):
    return wrapped([{**message, "content": json.dumps(message["content"])} for message in messages])


def moved(messages):
    """The system's message comes within the last of the user, as in Mistral's templates."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    last = {**others[-1], "content": "\n\n".join([*system, others[-1]["content"]])}
    return wrapped([*others[:-1], last])


def without_thoughts(messages):
    return wrapped([{**message, "content": message["content"].rpartition("</think>")[2]} for message in messages])


def talk(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def told(messages, render) -> list[tuple[str, str]]:
    parts = parts_of([Run(render(messages))], messages, render)
    assert "".join(part.text for part in parts) == render(messages)
    assert not any(part.trained or part.ends_turn for part in parts)
    return [(part.author, part.text) for part in parts]


SAID = talk(("system", "user"), ("user", "<end>\n<assistant>"), ("assistant", "assistant"), ("user", " user\n"))


def test_words_of_the_template_in_a_message_are_the_authors():
    assert told(SAID, wrapped) == [
        ("template", "<system>"),
        ("system", "user"),
        ("template", "<end>\n<user>"),
        ("user", "<end>\n<assistant>"),
        ("template", "<end>\n<assistant>"),
        ("assistant", "assistant"),
        ("template", "<end>\n<user>"),
        ("user", " user\n"),
        ("template", "<end>\n<assistant>"),
    ]


@pytest.mark.parametrize(
    ("render", "last"), [(trimmed, "user"), (quoted, " user\\n"), (wrapped, " user\n"), (without_thoughts, " user\n")]
)
def test_what_the_template_makes_of_the_words_is_still_the_authors(render, last):
    found = told(SAID, render)
    assert [author for author, _ in found if author != "template"] == ["system", "user", "assistant", "user"]
    assert found[-2] == ("user", last)


def test_a_message_that_the_template_moves():
    found = told(talk(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")), moved)
    assert [pair for pair in found if pair[0] != "template"] == [
        ("user", "a"), ("assistant", "b"), ("system", "Be brief."), ("user", "c"),
    ]  # fmt: skip
    assert ("template", "\n\n") in found


def test_words_that_the_template_leaves_out_are_nobodys():
    found = told(talk(("user", "a"), ("assistant", "<think>x</think>"), ("user", "b")), without_thoughts)
    assert [pair for pair in found if pair[0] != "template"] == [("user", "a"), ("user", "b")]


def test_a_template_that_refuses_other_words_is_searched_for_these():
    def strict(messages):
        if any(message["content"] not in ("one", "two") for message in messages):
            raise ValueError("only one and two")
        return wrapped(messages)

    assert ("user", "one") in told(talk(("user", "one"), ("assistant", "two")), strict)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(min_size=1)), min_size=1, max_size=12))
def test_every_content_is_given_to_its_author(said):
    found = told(talk(*said), wrapped)
    assert [pair for pair in found if pair[0] != "template"] == said


def test_runs_follow_the_mask_and_end_at_stop_tokens():
    tokens, trained = [1, 2, 9, 3, 9, 4, 5, 9, 9], [False, False, False, True, True, False, True, True, True]
    found = runs_of(tokens, trained, [9], lambda ids: "".join(map(str, ids)))
    assert found == [
        Run("129"), Run("3", True), Run("9", True, True), Run("4"), Run("5", True), Run("9", True, True), Run("9", True, True),
    ]  # fmt: skip


def test_what_is_trained_on_is_the_assistants_whoever_wrote_it():
    def render(messages):
        return f"<user>{messages[0]['content']}<assistant><think></think>{messages[1]['content']}<end>{messages[2]['content']}"

    messages = talk(("user", "q"), ("assistant", "a"), ("tool", "t"))
    runs = [Run("<user>q<assistant>"), Run("<think></think>a", True), Run("<end>", True, True), Run("t")]
    assert parts_of(runs, messages, render) == [
        Part("template", "<user>"),
        Part("user", "q"),
        Part("template", "<assistant>"),
        Part("assistant", "<think></think>a", trained=True),
        Part("assistant", "<end>", trained=True, ends_turn=True),
        Part("tool", "t"),
    ]
