"""Chat templates in the manner of many families, ready to be asked, and a talk in the words of each."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from ctpo_megatron.config.model import ChatConfig
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
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "function": {"name": "py", "arguments": {"code": "1+1"}}}],
}
CALLED = [*QUESTION, CALL, {"role": "tool", "content": "2", "tool_call_id": "c1"}, {"role": "assistant", "content": "It is 2."}]


def loader(new_directory: Callable[[], Path]) -> Callable[..., ChatTokenizer]:
    """A function that gives the ChatTokenizer of a family, made once, or of another configuration and with changes."""
    made: dict[tuple[str, str, str], ChatTokenizer] = {}

    def make(name: str | of.Family, config: ChatConfig | None = None, **changes: Any) -> ChatTokenizer:
        key = (repr(name), repr(config), repr(changes))
        if key not in made:
            family, usual = FAMILIES[name] if isinstance(name, str) else (name, ChatConfig())
            directory = family.write(new_directory(), **changes)
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
