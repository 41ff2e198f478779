"""What the configuration says of a chat: its date, its options, its template, and the tokens that end a turn."""

from __future__ import annotations

import dataclasses
import json
from datetime import date

import pytest

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.errors import ConfigError, ModelError, RenderError
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support import chat_models as of
from tests.support.chats import (
    CHATML,
    DAY,
    QUESTION,
    loader,
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return loader(lambda: tmp_path_factory.mktemp("model"))


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
