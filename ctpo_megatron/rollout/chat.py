"""Between text and tokens, by the model's own chat template.

Rollouts never render a conversation twice: a prompt is rendered once, sampled tokens are kept as they came, and a tool's
output is put between them as what the template writes between two assistant turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ModelError, RenderError

# stand-ins that the template is rendered with once, to find what it writes around them
_ASSISTANT, _TOOL = "assistantsaysthis", "toolsaysthis"


class ChatTokenizer:
    """The tokenizer and chat template of a model directory.

    Raises ModelError where the directory has no tokenizer or chat template, or the template does not end an assistant's turn
    with one of the model's stop tokens.
    """

    def __init__(self, model_path: str | Path) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        self._path = Path(model_path)
        if not self._path.is_dir():
            raise ModelError(f"{self._path} is not a directory; needed: a model in Hugging Face format")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
        except Exception as error:  # tokenizers raises plain ones about a broken tokenizer.json
            raise ModelError(f"{self._path} holds no tokenizer that transformers can load: {error}") from error
        if not self._tokenizer.chat_template:
            raise ModelError(f"{self._path} has no chat template (chat_template.jinja, or in tokenizer_config.json)")
        self.stop_token_ids: list[int] = self._find_stop_tokens()
        self._end_id, before, after = self._find_tool_frame()
        self._before_tool, self._after_tool = self._encode(before), self._encode(after)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of `messages`, generation prompt included."""
        return self._encode(self._render(list(messages)))

    def prompt_lengths(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
        """Number of tokens that `prompt_ids` gives each of `conversations`; many at once are quicker than one by one."""
        texts = [self._render(list(messages)) for messages in conversations]
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def assistant_ids(self, text: str) -> list[int]:
        """Token ids of an assistant's turn, its end token included."""
        return [*self._encode(text, plain=True), self._end_id]

    def tool_ids(self, text: str) -> list[int]:
        """Token ids between the end token of an assistant's turn and the start of the next, for a tool that said `text`.

        Names of special tokens in `text` stay plain text, so a program cannot write turns of the conversation.
        """
        return [*self._before_tool, *self._encode(text, plain=True), *self._after_tool]

    def demonstration(self, messages: Sequence[dict[str, Any]], start: int) -> tuple[list[int], list[tuple[str, list[int]]]]:
        """Token ids of the prompt messages[:start], and (role, ids) of what follows. Raises RenderError for keys besides text."""
        parts = []
        for message in messages[start:]:
            for key in message.keys() - {"role", "content", "name", "tool_call_id"}:
                raise RenderError(f"a message has {key!r}, which would be lost; write it into its content")
            encode = self.assistant_ids if message["role"] == "assistant" else self.tool_ids
            parts.append((message["role"], encode(message["content"])))
        return self.prompt_ids(messages[:start]), parts

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, with or without special tokens. For tools, rewards and people only."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Ids of `text` as it stands; `plain` reads special tokens' names as ordinary text."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _find_stop_tokens(self) -> list[int]:
        """End-of-text tokens of the tokenizer and of generation_config.json, ascending."""
        found = {self._tokenizer.eos_token_id}
        config = self._path / "generation_config.json"
        if config.is_file():
            try:
                named = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
            except ValueError as error:
                raise ModelError(f"{config} is not JSON: {error}") from error
            found |= set(named) if isinstance(named, list) else {named}
        found.discard(None)
        if not found:
            raise ModelError(f"{self._path}: neither the tokenizer nor generation_config.json names an eos token")
        return sorted(found)

    def _find_tool_frame(self) -> tuple[int, str, str]:
        """The token that ends an assistant's turn, and the template's text from there to a tool's output and after it."""
        rendered = self._render_tool_turn()
        answer = rendered.index(_ASSISTANT) + len(_ASSISTANT)
        ends = [(rendered.find(text, answer), -len(text), id_) for id_, text in self._stop_tokens_text()]
        ends = [end for end in ends if answer <= end[0] < rendered.index(_TOOL)]
        if not ends:
            raise ModelError(
                f"{self._path}: the chat template ends an assistant's turn with none of the stop tokens "
                f"{[text for _, text in self._stop_tokens_text()]}; it renders {rendered[answer:]!r} after the turn"
            )
        place, negative_length, end_id = min(ends)
        before, after = rendered[place - negative_length :].split(_TOOL)
        return end_id, before, after

    def _render_tool_turn(self) -> str:
        """A conversation with a tool's turn; templates that know no tools get it as the user's."""
        from jinja2 import TemplateError

        start = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ASSISTANT}]
        try:
            rendered = self._render([*start, {"role": "tool", "content": _TOOL}])
        except TemplateError:
            rendered = ""
        if rendered.count(_TOOL) != 1 or _ASSISTANT not in rendered:
            rendered = self._render([*start, {"role": "user", "content": _TOOL}])
        if rendered.count(_TOOL) != 1 or rendered.count(_ASSISTANT) != 1:
            raise ModelError(f"{self._path}: the chat template renders neither a tool's nor a user's turn after an assistant's")
        return rendered

    def _stop_tokens_text(self) -> list[tuple[int, str]]:
        return [(id_, self._tokenizer.convert_ids_to_tokens(id_)) for id_ in self.stop_token_ids]
