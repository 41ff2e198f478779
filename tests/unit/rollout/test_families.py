"""Rollouts and demonstrations are what the chat template writes, for templates in the manner of many families."""

from __future__ import annotations

import dataclasses
import json
import logging
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.errors import ConfigError, ModelError, RenderError
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support import chat_models as of

CHATML = of.source("qwen2.5")
DAY = ChatConfig(chat_date=date(2026, 1, 31))
FAMILIES = {
    "qwen2.5": (of.QWEN25, ChatConfig()),
    "qwen2.5-base": (of.QWEN25_BASE, ChatConfig(stop_tokens=("<|im_end|>",))),
    "qwen3": (of.QWEN3, ChatConfig()),
    "qwen3-thinking": (of.QWEN3_THINKING, ChatConfig()),
    "llama3": (of.LLAMA3, ChatConfig()),
    "llama3-dated": (of.LLAMA3, ChatConfig(chat_date=date(2026, 1, 31), chat_options={"dated": True})),
    "glm4.5": (of.GLM45, ChatConfig()),
    "deepseek-v3": (of.DEEPSEEK_V3, ChatConfig()),
    "mistral": (of.MISTRAL, ChatConfig()),
    "gemma": (of.GEMMA, ChatConfig()),
}
REASONS = ("qwen3", "qwen3-thinking", "glm4.5")
NO_TOOL_ROLE = ("mistral", "gemma")
QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]
SAID = ["```python\nprint(1 + 1)\n```", "Once more:\n\n```python\n'x'\n```", "It is \\boxed{2}."]
OUTPUTS = ['2\n"x" <b> & é', "  3\n\n"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The ChatTokenizer of a family, made once, or of another configuration and with changes."""
    made = {}

    def make(name: str | of.Family, config: ChatConfig | None = None, **changes) -> ChatTokenizer:
        key = (repr(name), repr(config), repr(changes))
        if key not in made:
            family, usual = FAMILIES[name] if isinstance(name, str) else (name, ChatConfig())
            directory = family.write(tmp_path_factory.mktemp("model"), **changes)
            made[key] = ChatTokenizer(directory, config or usual)
        return made[key]

    return make


def spoken(name: str, text: str) -> str:
    """`text` as a message of a model of that family, with reasoning where it reasons."""
    return f"<think>\nI see.\n</think>\n\n{text}" if name in REASONS else text


def talk(name: str, turns: int = 3) -> list[dict[str, str]]:
    """Turns of the assistant, a tool's output between; in the user's role where the family has none for tools."""
    messages = list(QUESTION)
    for number in range(turns):
        messages.append({"role": "assistant", "content": spoken(name, SAID[number])})
        messages.append({"role": "user" if name in NO_TOOL_ROLE else "tool", "content": OUTPUTS[number % 2]})
    return messages[:-1]


def template_text(chat: ChatTokenizer, messages, *, prompt: bool = False) -> str:
    """What transformers renders."""
    return chat._tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, **chat._template._variables
    )


def ids_of(chat: ChatTokenizer, text: str) -> list[int]:
    return chat._tokenizer.encode(text, add_special_tokens=False)


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
@settings(max_examples=15, deadline=None)
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
@settings(max_examples=15, deadline=None)
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


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "function": {"name": "py", "arguments": {"code": "1+1"}}}],
}
CALLED = [*QUESTION, CALL, {"role": "tool", "content": "2", "tool_call_id": "c1"}, {"role": "assistant", "content": "It is 2."}]


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


def test_several_tools_may_speak_after_one_turn(load):
    chat = load("glm4.5")
    call = {**CALL, "content": ""}
    messages = [*QUESTION, call, {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}, CALLED[3]]
    _, parts = chat.demonstration(messages, 1)
    assert chat.decode(parts[1][1], special=True).count("<tool_response>") == 2
    text = "".join(chat.decode(part, special=True) for _, part in parts)
    assert chat.decode(chat.prompt_ids(QUESTION), special=True) + text == template_text(chat, messages) + "<|user|>"


def test_a_date_in_a_prompt_is_the_configurations(load):
    with pytest.raises(ConfigError, match=r"set model\.chat_date, such as model\.chat_date=2026-01-31"):
        load(of.HARMONY)
    assert "Current date: 2026-01-31" in load(of.HARMONY, DAY).decode(load(of.HARMONY, DAY).prompt_ids(QUESTION))
    assert "Today Date: 26 Jul 2024" in load("llama3").decode(load("llama3").prompt_ids(QUESTION))
    for options in ({}, {"dated": True}):  # by date_string, and by strftime_now
        chat = load("llama3", ChatConfig(chat_date=date(2026, 1, 31), chat_options=options))
        assert "Today Date: 31 Jan 2026" in chat.decode(chat.prompt_ids(QUESTION))
    with pytest.raises(ConfigError, match=r"set model\.chat_date"):
        load("llama3", ChatConfig(chat_options={"dated": True}))


def test_an_option_that_the_template_does_not_know_is_refused(load):
    with pytest.raises(ConfigError, match=r"chat_options\.enable_thinkin: .*Did you mean 'enable_thinking'"):
        load("qwen3", ChatConfig(chat_options={"enable_thinkin": False}))
    low = load(of.HARMONY, ChatConfig(chat_date=date(2026, 1, 31), chat_options={"reasoning_effort": "low"}))
    assert "Reasoning: low" in low.decode(low.prompt_ids(QUESTION))


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


# ---- base models


def test_a_base_model_is_told_which_key_to_set(load, tmp_path):
    with pytest.raises(ModelError, match=r"none of the stop tokens \['<\|endoftext\|>'\]") as caught:
        load(of.QWEN25_BASE)
    assert "Add the token that ends a turn to model.stop_tokens, such as model.stop_tokens='[\"<|im_end|>\"]'" in str(
        caught.value
    )
    chat = load("qwen2.5-base")
    assert set(chat._tokens.ends) == {"<|endoftext|>", "<|im_end|>"}
    assert chat.assistant_ids("a")[-1] == chat._tokens.ends["<|im_end|>"]
    # the model ends the text instead of its turn: its token stays, and the template closes the turn
    after = chat.tool_ids("4", end=chat._tokens.ends["<|endoftext|>"])
    assert chat.decode(after, special=True).startswith("<|im_end|>\n<|im_start|>user\n<tool_response>")


@pytest.mark.parametrize("given", ["text", "file"])
def test_a_base_model_without_a_template_takes_one_from_the_configuration(given, tmp_path):
    directory = of.QWEN25_BASE.write(tmp_path / "base")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template .*give one with model\.chat_template"):
        ChatTokenizer(directory)
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    config = ChatConfig(chat_template=CHATML if given == "text" else str(file), stop_tokens=("<|im_end|>",))
    chat = ChatTokenizer(directory, config)
    chat.check_turns(QUESTION)
    # what is exported needs the configuration no more
    chat.save(directory)
    alone = ChatTokenizer(directory)
    assert alone.prompt_ids(QUESTION) == chat.prompt_ids(QUESTION)
    assert alone.stop_token_ids == chat.stop_token_ids


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"stop_tokens": ("<|im_ends|>",)}, r"'<\|im_ends\|>' is not one token .*Did you mean '<\|im_end\|>'"),
        ({"stop_tokens": ("",)}, "'' is not one token"),
        ({"chat_template": "/no/such/file.jinja"}, r"model\.chat_template: /no/such/file\.jinja is not a readable file"),
        ({"chat_template": "{% for m in messages %}{{ m.content }"}, "the template of model.chat_template is not Jinja: line 1"),
        ({"chat_template": "{{ messages[0].content + 1 }}"}, "TypeError"),
        ({"chat_template": "{{ messages.nothing.content }}"}, "UndefinedError"),
    ],
)
def test_a_setting_that_cannot_be_used_is_an_error_of_the_input(load, config, words):
    with pytest.raises((ConfigError, ModelError), match=words) as caught:
        load(of.QWEN25, ChatConfig(**config))
    assert caught.value.exit_code == 2


def test_a_plain_token_can_end_a_turn(load):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    chat = load(dataclasses.replace(of.QWEN25_BASE, template=template), ChatConfig(stop_tokens=("\n\n",)))
    assert chat._end == "\n\n"
    chat.check_turns(QUESTION)
    with pytest.raises(RenderError, match="after the stop token of the turn"):
        chat.demonstration([*QUESTION, {"role": "assistant", "content": "one\n\ntwo"}], 1)


def test_all_files_of_a_model_name_stop_tokens(load, tmp_path):
    directory = of.QWEN25.write(tmp_path / "model")
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    (directory / "generation_config.json").unlink()
    assert ChatTokenizer(directory).stop_token_ids == [ids["<|im_end|>"]]
    # servers stop at what config.json names, so it is a stop token here as well
    (directory / "config.json").write_text(json.dumps({"eos_token_id": ids["<|endoftext|>"]}))
    assert set(ChatTokenizer(directory).stop_token_ids) == {ids["<|im_end|>"], ids["<|endoftext|>"]}


def test_a_tools_output_in_json_is_escaped_as_the_template_does_it(load):
    chat = load("llama3")
    shown = chat.decode(chat.tool_ids('4\n"x"\t<|eot_id|>'), special=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert shown == header.format("ipython") + '"4\\n\\"x\\"\\t<|eot_id|>"<|eot_id|>' + header.format("assistant")
    assert chat.tool_ids("<|eot_id|>").count(chat._tokens.ends["<|eot_id|>"]) == 1


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
