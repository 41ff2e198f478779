"""Messages that a chat template would write in part or otherwise, and templates that cannot be rolled out, are refused."""

from __future__ import annotations

import dataclasses

import pytest

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support import chat_models as of
from tests.support.chats import (
    CALL,
    CALLED,
    CHATML,
    DAY,
    QUESTION,
    loader,
    talk,
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return loader(lambda: tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("family", "message", "key"),
    [
        (of.GEMMA, {"role": "assistant", "content": "2", "reasoning_content": "I see."}, "reasoning_content"),
        (of.LLAMA3, {"role": "assistant", "content": "2", "reasoning_content": "I see."}, "reasoning_content"),
        (of.MISTRAL, {"role": "assistant", "content": "2", "tool_calls": CALL["tool_calls"]}, "tool_calls"),
        (of.QWEN25, {"role": "assistant", "content": "2", "name": "Ann"}, "name"),
        (of.DEEPSEEK_V3, {"role": "assistant", "content": "2", "thinking": "I see."}, "thinking"),
    ],
)
def test_a_key_that_the_template_does_not_write_is_refused(load, family, message, key):
    with pytest.raises(RenderError, match=rf"messages\[1\] has the key '{key}'"):
        load(family, DAY).demonstration([*QUESTION, message], 1)
    # null is no value: parquet has every key in every row
    load(family, DAY).demonstration([*QUESTION, {**message, key: None}], 1)


def test_content_that_a_template_drops_is_refused(load):
    # a system message that nobody reads; words beside a call; reasoning inside of the content
    silent = "{%- for m in messages if m.role != 'system' %}{{- '[' + m.role + ']' + m.content + '<|im_end|>' }}{%- endfor %}"
    chat = load(
        dataclasses.replace(of.QWEN25, template=silent + "{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}")
    )
    with pytest.raises(RenderError, match=r"messages\[0\]: .* does not write the content of a message of the role 'system'"):
        chat.check_prompt([{"role": "system", "content": "Be brief."}, *QUESTION])
    with pytest.raises(RenderError, match=r"messages\[1\]: .*'assistant' beside its calls"):
        load(of.LLAMA3).demonstration([*QUESTION, {**CALL, "content": "I call."}, *CALLED[2:]], 1)
    drops = of.source("deepseek-r1").replace(r"<think>\n", "")  # as it was first published
    thought = {"role": "assistant", "content": "<think>\nI see.\n</think>\n\n2"}
    with pytest.raises(RenderError, match="leaves '<think>' out of the assistant's content"):
        load(dataclasses.replace(of.DEEPSEEK_R1, template=drops)).demonstration([*QUESTION, thought], 1)


FIRST_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages if m.role != 'system' %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LAST_THREE = FIRST_SYSTEM.replace("messages[0].role == 'system'", "false").replace(
    "messages if m.role != 'system'", "messages[-3:]"
)


@pytest.mark.parametrize(
    ("template", "written", "roles", "lost"),
    [
        (FIRST_SYSTEM, ("system", "user"), ("system", "system", "user"), 1),
        (FIRST_SYSTEM, ("system", "user"), ("system", "user", "assistant", "system", "user"), 3),
        (LAST_THREE, ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user"), 0),
        (LAST_THREE, ("system", "user"), ("system", "user", "assistant", "user"), 0),
    ],
)
def test_content_that_a_template_drops_at_its_place_is_refused(tmp_path, template, written, roles, lost):
    """That a message of the same role was written elsewhere says nothing."""
    chat = ChatTokenizer(of.QWEN25.write(tmp_path / "m", template=template))
    chat.check_prompt([{"role": role, "content": f"words {place}"} for place, role in enumerate(written)])
    with pytest.raises(RenderError, match=rf"messages\[{lost}\].* does not write the content of a message of the role"):
        chat.check_prompt([{"role": role, "content": f"words {place}"} for place, role in enumerate(roles)])


@pytest.mark.parametrize("family", [of.MISTRAL, of.GEMMA])
def test_a_template_without_system_messages_says_which_setting_to_change(load, family):
    chat = load(family)
    with pytest.raises(RenderError) as caught:
        chat.check_prompt([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert "It can write it without the system message: set data.system_prompt to null" in str(caught.value)
    assert "roles must alternate" in str(caught.value) or "System role not supported" in str(caught.value)


def test_a_system_message_that_moves_from_turn_to_turn_cannot_be_rolled_out(load):
    chat = load(of.MISTRAL_LAST)
    chat.check_turns(QUESTION)
    with pytest.raises(RenderError, match="otherwise than turn by turn") as caught:
        chat.check_turns([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert "turn by turn it reads '<s>[INST]Be brief." in str(caught.value)
    assert "as a whole it reads '<s>[INST]What is 1 + 1?[/INST]" in str(caught.value)
    assert "rollout.tool=null" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        # the number of messages, the whole talk again, another last message: nothing that continues
        ("{{ messages | length }}" + CHATML, "differ at character 0"),
        (CHATML.replace("{%- for m in", "{%- for m in messages[-1:] + "), "as a whole it reads"),
        (CHATML.replace("{%- for m in messages", "{%- for m in messages[-3:]"), "turn by turn"),
    ],
)
def test_a_template_whose_turns_do_not_continue_one_another_is_refused(load, template, words):
    chat = load(dataclasses.replace(of.QWEN25, template=template))
    with pytest.raises(RenderError, match=words):
        chat.check_turns(QUESTION)
    with pytest.raises(RenderError):
        chat.demonstration(talk("qwen2.5"), 1)
