"""Rollouts and demonstrations are what the chat template writes, for templates in the manner of many families."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support import chat_models as of
from tests.support.chats import (
    CALL,
    CALLED,
    DAY,
    FAMILIES,
    OUTPUTS,
    QUESTION,
    SAID,
    ids_of,
    loader,
    spoken,
    talk,
    template_text,
)
from tests.support.often import often


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return loader(lambda: tmp_path_factory.mktemp("model"))


def as_played(chat: ChatTokenizer, turns: list[str], end: str | None = None) -> list[int]:
    """The tokens of a rollout whose turns are these texts, `end` after each; it ends with the prompt of the next turn."""
    ids, outputs = chat.prompt_ids(QUESTION), []
    for number, turn in enumerate(turns):
        ends = chat._tokens.ends[end or chat._end]
        ids += [*ids_of(chat, turn), ends]
        ids += chat.tool_ids(OUTPUTS[number], earlier=outputs, end=ends)
        outputs.append(OUTPUTS[number])
    return ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rollout_has_the_tokens_of_the_template_several_turns_deep(load, name, caplog):
    chat = load(name)
    messages = talk(name)[:-1]
    whole = template_text(chat, messages, prompt=True)
    # what the model writes is what the template writes of it
    words = {
        "qwen3": ["<think>\nI see.\n</think>\n\n" + said for said in SAID],
        "qwen3-thinking": ["I see.\n</think>\n\n" + said for said in SAID],
        "glm4.5": ["\n<think>I see.</think>\n" + said for said in SAID],
        "mistral": [" " + said for said in SAID],
    }.get(name, SAID)
    end = "<|observation|>" if name == "glm4.5" else None
    assert as_played(chat, words[:2], end) == ids_of(chat, whole)
    with caplog.at_level(logging.WARNING):
        chat.check_turns(QUESTION)
        chat.check_prompt(QUESTION)
    assert not caplog.records  # there is nothing to tell


@pytest.mark.parametrize("name", FAMILIES)
def test_a_demonstration_has_the_tokens_of_the_template_and_learns_what_the_assistant_wrote(load, name):
    chat = load(name)
    messages = talk(name)
    demonstration = [{**m, "role": "tool"} if n > 1 and m["role"] == "user" else m for n, m in enumerate(messages)]
    prompt, parts = chat.demonstration(demonstration, 1)
    ids = prompt + [i for _, part in parts for i in part]
    whole = template_text(chat, messages)
    if name == "glm4.5":
        whole += "<|user|>"  # which ends the last turn
    assert chat.decode(ids, special=True) == whole.rstrip("\n")
    assert ids == ids_of(chat, whole.rstrip("\n"))
    assert prompt == chat.prompt_ids(QUESTION)
    assert [role for role, _ in parts] == ["assistant", "tool", "assistant", "tool", "assistant"]
    for said, (role, part) in zip([*SAID[:1], None, *SAID[1:2], None, *SAID[2:]], parts, strict=True):
        if role == "assistant":
            assert part[-1] in chat.stop_token_ids
            assert said in chat.decode(part)
            assert sum(i in chat.stop_token_ids for i in part) == 1


@pytest.mark.parametrize("name", [*FAMILIES, "r1", "harmony"])
@settings(max_examples=often(15), deadline=None)
@given(data=st.data())
def test_a_tools_output_is_what_the_template_writes_of_it_and_a_program_cannot_write_turns(load, name, data):
    extra = {"r1": of.DEEPSEEK_R1, "harmony": of.HARMONY}
    chat = load(name) if name in FAMILIES else load(extra[name], DAY)
    special = [token.content for token in chat._tokenizer.added_tokens_decoder.values() if token.special]
    pieces = st.one_of(st.text(max_size=6), st.sampled_from(["\n", " ", '"', "\\", "\ufdd0", "assistantsaysthis", *special]))
    output = "".join(data.draw(st.lists(pieces, max_size=6)))
    role = chat._frames.roles[0]
    ids = chat.tool_ids(output, earlier=["1"])
    stand_ins = [
        *QUESTION,
        {"role": "assistant", "content": "a"},
        {"role": role, "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    shown = output.replace("\ufdd0", "\ufffd")
    whole = template_text(chat, [*stand_ins, {"role": role, "content": shown}], prompt=True)
    assert whole.endswith(chat.decode(ids, special=True))
    plain = chat.tool_ids("2", earlier=["1"])
    among = {chat._tokenizer.convert_tokens_to_ids(each) for each in special}
    assert [i for i in ids if i in among] == [i for i in plain if i in among]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=often(15), deadline=None)
@given(data=st.data())
def test_any_demonstration_is_the_templates_text_and_special_only_where_the_template_is(load, name, data):
    chat = load(name)
    special = [token.content for token in chat._tokenizer.added_tokens_decoder.values() if token.special]
    pieces = st.sampled_from(["a", "\n", "\n\n", " ", "  ", '"', "\\", "é", "{{ x }}", *special])
    texts = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(str.strip)
    if name == "qwen3-thinking":  # without reasoning it leaves out what a generation begins with
        texts = texts.map(lambda text: spoken(name, text))
    messages = list(QUESTION)
    for number in range(data.draw(st.integers(0, 2))):
        messages += [
            {"role": "assistant", "content": data.draw(texts)},
            {"role": "tool", "content": f"{number}{data.draw(texts)}"},
        ]
    messages.append({"role": "assistant", "content": data.draw(texts)})
    prompt, parts = chat.demonstration(messages, 1)
    whole = template_text(chat, chat._forms.fitting(messages)) + ("<|user|>" if name == "glm4.5" else "")
    text = chat.decode(prompt, special=True) + "".join(chat.decode(part, special=True) for _, part in parts)
    assert text == whole.removesuffix("\n") if text[-1] != "\n" else text == whole
    for role, part in parts:
        assert role == "tool" or [i for i in part if i in chat.stop_token_ids] == [part[-1]]


def test_a_turn_of_glm_ends_with_the_token_of_the_next_role(load):
    chat = load("glm4.5")
    name = chat._tokens.ends
    tool = chat.decode(chat.tool_ids("4", end=name["<|observation|>"]), special=True)
    assert tool == "\n<tool_response>\n4\n</tool_response><|assistant|>"
    # the model ended its turn as if the user came next: then the user brings the output
    user = chat.decode(chat.tool_ids("4", end=name["<|user|>"]), special=True)
    assert user == "\n4<|assistant|>"
    # a token that ends no turn of the template is the model's own; the template's follows
    other = chat.decode(chat.tool_ids("4", end=name["<|endoftext|>"]), special=True)
    assert other == "<|observation|>\n<tool_response>\n4\n</tool_response><|assistant|>"
    _, parts = chat.demonstration([*talk("glm4.5", 2)], 1)
    assert [part[-1] for role, part in parts if role == "assistant"] == [name["<|observation|>"], name["<|user|>"]]


def test_thinking_off_opens_every_turn_with_an_empty_block(load, caplog):
    with caplog.at_level(logging.WARNING):
        chat = load("qwen3", ChatConfig(chat_options={"enable_thinking": False}))
        chat.check_turns(QUESTION)
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat.decode(chat.prompt_ids(QUESTION), special=True).endswith(opened)
    assert chat.decode(chat.tool_ids("4"), special=True).endswith(opened)
    assert "leaves reasoning, or what it opens a turn with, out of earlier turns" in caplog.text  # and we keep it, and say so
    prompt, parts = chat.demonstration(talk("qwen2.5", 2), 1)
    assert chat.decode(prompt, special=True).endswith(opened)
    assert [chat.decode(part) for role, part in parts if role == "assistant"] == SAID[:2]
    glm = load("glm4.5", ChatConfig(chat_options={"enable_thinking": False}))
    glm.check_turns(QUESTION)
    assert glm.decode(glm.prompt_ids(QUESTION), special=True).endswith("/nothink<|assistant|>\n<think></think>")


def test_a_block_that_a_generation_begins_in_is_closed_in_every_turn(load):
    chat = load("qwen3-thinking")
    prompt, parts = chat.demonstration(talk("qwen2.5"), 1)
    text = chat.decode(prompt, special=True) + "".join(chat.decode(part, special=True) for _, part in parts)
    assert text.count("<|im_start|>assistant\n<think>\n\n</think>\n\n") == 3
    # with reasoning in some turns only
    mixed = [*talk("qwen3", 2)[:3], *talk("qwen2.5")[3:]]
    prompt, parts = chat.demonstration(mixed, 1)
    text = chat.decode(prompt, special=True) + "".join(chat.decode(part, special=True) for _, part in parts)
    assert text.count("<think>") == text.count("</think>") == 3
    assert text.count("I see.") == 1


def test_reasoning_that_a_template_drops_stays_in_rollouts_and_cannot_be_taught(load, caplog):
    chat = load(of.DEEPSEEK_R1)
    with caplog.at_level(logging.WARNING):
        chat.check_turns(QUESTION)
    assert "out of earlier turns" in caplog.text
    with pytest.raises(RenderError, match="does not write the assistant's turn where a generation would begin it") as caught:
        chat.demonstration([*QUESTION, {"role": "assistant", "content": "<think>\nI see.\n</think>\n\n2"}], 1)
    assert "<think>" in str(caught.value)
    assert "2<|end|>" in str(caught.value)


def test_reasoning_of_a_demonstration_is_taught_whole(load):
    chat = load("qwen3")
    messages = [*QUESTION, {"role": "assistant", "reasoning_content": "I see.", "content": "It is 2."}]
    _, ((_, part),) = chat.demonstration(messages, 1)
    assert chat.decode(part, special=True) == "<think>\nI see.\n</think>\n\nIt is 2.<|im_end|>"
    # earlier turns belong to the prompt: there the template decides
    later = [*messages, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    prompt, _ = chat.demonstration(later, 3)
    assert "I see." not in chat.decode(prompt)


@pytest.mark.parametrize(
    ("family", "written", "end", "answer"),
    [
        (
            of.QWEN25,
            '\n<tool_call>\n{"name": "py", "arguments": {"code": "1+1"}}\n</tool_call>',
            "<|im_end|>",
            "<tool_response>\n2\n",
        ),
        (
            of.QWEN3,
            '\n<tool_call>\n{"name": "py", "arguments": {"code": "1+1"}}\n</tool_call>',
            "<|im_end|>",
            "<tool_response>\n2\n",
        ),
        (of.GLM45, '\n<think></think>\n<tool_call>py{"code": "1+1"}</tool_call>', "<|observation|>", "<tool_response>\n2\n"),
        (of.LLAMA3, '{"name": "py", "parameters": {"code": "1+1"}}', "<|eot_id|>", '\n\n"2"<|eot_id|>'),
        (of.HARMONY, ' to=functions.py<|channel|>commentary json<|message|>{"code": "1+1"}', "<|call|>", '<|message|>"2"<|end|>'),
    ],
)
def test_calls_are_taught_as_the_template_writes_them(load, family, written, end, answer):
    chat = load(family, DAY)
    _, parts = chat.demonstration(CALLED, 1)
    assert chat.decode(parts[0][1], special=True) == written + end
    assert answer in chat.decode(parts[1][1], special=True)


@pytest.mark.parametrize("text", ['{"code": "1+1"}', '{"code":"1+1"}', '{ "code" :\n"1+1"}'])
@pytest.mark.parametrize("family", [of.QWEN25, of.GLM45, of.LLAMA3])
def test_arguments_that_are_json_text_are_the_object_they_say(load, family, text):
    """OpenAI's interface has them so; these templates would quote the text again, as no program that reads calls expects."""
    chat = load(family, DAY)
    call = {**CALL, "tool_calls": [{"id": "c1", "function": {"name": "py", "arguments": text}}]}
    assert chat.demonstration([QUESTION[0], call, *CALLED[2:]], 1) == chat.demonstration(CALLED, 1)
    assert call["tool_calls"][0]["function"]["arguments"] == text


@pytest.mark.parametrize(
    ("family", "arguments", "written"),
    [
        (of.QWEN3, '{"code": "1+1"}', '"arguments": {"code": "1+1"}}'),  # writes text as it is
        (of.QWEN25, "print(1)", '"arguments": "print(1)"}'),  # no object
        (of.QWEN25, "[1]", '"arguments": "[1]"}'),
    ],
)
def test_arguments_stay_text_where_the_template_writes_it_or_it_is_no_object(load, family, arguments, written):
    chat = load(family, DAY)
    call = {**CALL, "tool_calls": [{"id": "c1", "function": {"name": "py", "arguments": arguments}}]}
    _, parts = chat.demonstration([QUESTION[0], call, *CALLED[2:]], 1)
    assert written in chat.decode(parts[0][1], special=True)


def test_several_tools_may_speak_after_one_turn(load):
    chat = load("glm4.5")
    call = {**CALL, "content": ""}
    messages = [*QUESTION, call, {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}, CALLED[3]]
    _, parts = chat.demonstration(messages, 1)
    assert chat.decode(parts[1][1], special=True).count("<tool_response>") == 2
    text = "".join(chat.decode(part, special=True) for _, part in parts)
    assert chat.decode(chat.prompt_ids(QUESTION), special=True) + text == template_text(chat, messages) + "<|user|>"


def test_gpt_oss_keeps_its_own_end_and_the_templates(load, caplog):
    chat = load(of.HARMONY, DAY)
    with caplog.at_level(logging.WARNING):
        chat.check_turns(QUESTION)
    assert "ends an earlier turn with another token than the last" in caplog.text
    ends = chat._tokens.ends
    after = chat.decode(chat.tool_ids("4", end=ends["<|return|>"]), special=True)
    assert after == "<|end|><|start|>user<|message|>4<|end|><|start|>assistant"
    thought = {"role": "assistant", "thinking": "I see.", "content": "It is 2."}
    _, ((_, part),) = chat.demonstration([*QUESTION, thought], 1)
    said = "<|channel|>analysis<|message|>I see.<|end|><|start|>assistant<|channel|>final<|message|>It is 2.<|return|>"
    assert chat.decode(part, special=True) == said


def test_a_tools_output_in_json_is_escaped_as_the_template_does_it(load):
    chat = load("llama3")
    shown = chat.decode(chat.tool_ids('4\n"x"\t<|eot_id|>'), special=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert shown == header.format("ipython") + '"4\\n\\"x\\"\\t<|eot_id|>"<|eot_id|>' + header.format("assistant")
    assert chat.tool_ids("<|eot_id|>").count(chat._tokens.ends["<|eot_id|>"]) == 1
