"""Prompts from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ctpo_megatron.data.answers import answer_text
from ctpo_megatron.data.tables import check_keys, check_messages, quote, read_rows
from ctpo_megatron.errors import DataError
from ctpo_megatron.types import Prompt

COLUMNS = ("prompt", "reward_model")
ROLES = ("system", "user", "assistant")


class PromptTokenizer(Protocol):
    """Turns a conversation into the tokens that generation starts from."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of `messages`, generation prompt included."""
        ...


def read_prompts(path: str | Path, *, system_prompt: str | None = None) -> list[Prompt]:
    """All rows of a .parquet or .jsonl file with the columns `prompt` (list of {role, content}) and `reward_model`
    (struct with `ground_truth`); further columns are ignored.

    `system_prompt` is put before conversations without a system message. Raises DataError, naming the row, where one cannot
    be used: no row is ever left out.
    """
    return [_prompt(place, index, row, system_prompt) for index, (place, row) in enumerate(read_rows(path, COLUMNS))]


def check_prompt_lengths(prompts: Sequence[Prompt], tokenizer: PromptTokenizer, *, max_tokens: int, path: str | Path) -> None:
    """Raise DataError for the first prompt of `path` that is longer than `max_tokens`."""
    for prompt in prompts:
        length = len(tokenizer.prompt_ids(prompt.messages))
        if length > max_tokens:
            raise DataError(
                f"{path} row {prompt.index}: the prompt has {length} tokens; allowed: data.max_prompt_tokens = {max_tokens}. "
                "Raise that limit or remove the row."
            )


def _prompt(place: str, index: int, row: dict[str, Any], system_prompt: str | None) -> Prompt:
    messages = check_messages(place, "prompt", row["prompt"], ROLES)
    _check_extra(place, row.get("extra_info"))
    if messages[-1]["role"] != "user":
        raise DataError(f"{place}: the last message of 'prompt' has role {messages[-1]['role']!r}; it must be 'user'")
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages = ({"role": "system", "content": system_prompt}, *messages)
    return Prompt(
        index=index,
        messages=messages,
        answer=_answer(place, row["reward_model"]),
    )


def _answer(place: str, reward_model: Any) -> str:
    if not isinstance(reward_model, dict):
        raise DataError(f"{place}: 'reward_model' is {quote(reward_model)}; needed: a struct with 'ground_truth'")
    check_keys(f"{place}: reward_model", reward_model, ("ground_truth",))
    return answer_text(place, "reward_model.ground_truth", reward_model["ground_truth"])


def _check_extra(place: str, extra: Any) -> None:
    if extra is not None and not isinstance(extra, dict):
        raise DataError(f"{place}: 'extra_info' is {quote(extra)}; needed: a struct, or nothing")
