"""Prompts from files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ctpo_megatron.data.answers import answer_text
from ctpo_megatron.data.complaints import Complaints, listed
from ctpo_megatron.data.messages import Message, PromptTokenizer, check_messages, rendering
from ctpo_megatron.data.tables import Batch, Table, check_keys, quote
from ctpo_megatron.errors import DataError
from ctpo_megatron.record.events import DataRead, Emit, discard
from ctpo_megatron.record.progress import reading_progress
from ctpo_megatron.types import Prompt

COLUMNS = ("prompt", "reward_model")
ROLES = ("system", "user", "assistant")
LENGTHS_AT_ONCE = 512  # conversations that go to the tokenizer together

Conversation = tuple[Message, ...]


def read_prompts(
    path: str | Path,
    *,
    system_prompt: str | None = None,
    emit: Emit = discard,
    source: str = "",
    difficulty: str | None = None,
) -> list[Prompt]:
    """All rows of a .parquet or .jsonl file with the columns `prompt` (list of messages) and `reward_model` (struct with
    `ground_truth`). Rows that say the same share their messages; `emit` hears how many they are, and what was ignored.

    `system_prompt` is put before conversations without a system message. `source`: what the prompts are said to be from.
    `difficulty`: the column with a number for each, None: there is none. Raises DataError, naming the rows, where some cannot
    be used: no row is ever left out.
    """
    columns = COLUMNS if difficulty is None else (*COLUMNS, difficulty)
    table, complaints = Table(path, columns, structs=("extra_info",)), Complaints(path)
    prompts: list[Prompt] = []
    known: dict[Any, Conversation] = {}
    with closing(table.batches()) as batches:
        for batch in batches:
            tasks = _tasks(batch, system_prompt, known, complaints, difficulty)
            first = len(prompts)
            for row, number in enumerate(batch.numbers.tolist()):
                messages, answer, value = tasks[number]
                prompts.append(Prompt(first + row, messages, answer, source, value))
    complaints.settle(table.rows)
    emit(DataRead(str(path), table.rows, len(known), table.ignored))
    return prompts


def _tasks(
    batch: Batch,
    system_prompt: str | None,
    known: dict[Any, Conversation],
    complaints: Complaints,
    difficulty: str | None,
) -> list[tuple[Conversation, str, float | None]]:
    """Messages, answer and difficulty of each distinct row.

    Conversations that are `known` are those very objects; new ones are added.
    """
    times = np.bincount(batch.numbers, minlength=len(batch.rows)).tolist()
    tasks: list[tuple[Conversation, str, float | None]] = []
    for row, first, count in zip(batch.rows, batch.firsts.tolist(), times, strict=True):
        try:
            place = batch.place(first)
            messages, answer = _task(place, row, system_prompt)
            value = None if difficulty is None else _difficulty(place, difficulty, row[difficulty])
        except DataError as error:
            complaints.add(str(error), count)
            messages, answer, value = (), "", None
        tasks.append((known.setdefault(_key(messages), messages), answer, value))
    return tasks


def _task(place: str, row: dict[str, Any], system_prompt: str | None) -> tuple[Conversation, str]:
    messages = check_messages(place, "prompt", row["prompt"], ROLES)
    if messages[-1]["role"] != "user":
        raise DataError(f"{place}: the last message of 'prompt' has role {messages[-1]['role']!r}; it must be 'user'")
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages = ({"role": "system", "content": system_prompt}, *messages)
    return messages, _answer(place, row["reward_model"])


def _key(messages: Conversation) -> Any:
    """Returns what tells a conversation from others."""
    plain = all(len(message) == 2 for message in messages)
    return tuple((message["role"], message["content"]) for message in messages) if plain else repr(messages)


def check_prompt_lengths(prompts: Sequence[Prompt], tokenizer: PromptTokenizer, *, max_tokens: int, path: str | Path) -> None:
    """Raise DataError as `prompt_lengths` and `refuse_long` do."""
    refuse_long(prompts, prompt_lengths(prompts, tokenizer, path), max_tokens=max_tokens, path=path)


def prompt_lengths(prompts: Sequence[Prompt], tokenizer: PromptTokenizer, path: str | Path) -> list[int]:
    """Tokens of each of the `prompts`, which are those of the file `path`; conversations that they share are looked at once.

    Raises DataError, naming the row, where the chat template cannot write one.
    """
    distinct: dict[int, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(id(prompt.messages), prompt)
    lengths = dict(zip(distinct, _lengths(list(distinct.values()), tokenizer, path), strict=True))
    return [lengths[id(prompt.messages)] for prompt in prompts]


def refuse_long(prompts: Sequence[Prompt], lengths: Sequence[int], *, max_tokens: int, path: str | Path) -> None:
    """Raise DataError, naming the first prompts of `path` that are longer than `max_tokens`, and how many there are.

    `lengths` are their tokens.
    """
    if max(lengths, default=0) <= max_tokens:
        return
    long = [(prompt.index, length) for prompt, length in zip(prompts, lengths, strict=True) if length > max_tokens]
    others = ""
    if len(long) > 1:
        named = listed([f"{index} ({length:,} tokens)" for index, length in long])
        others = f" {len(long):,} of {len(lengths):,} rows are too long, counted from 0: {named}."
    raise DataError(
        f"{path} row {long[0][0]}: the prompt has {long[0][1]} tokens; allowed: data.max_prompt_tokens = {max_tokens}.{others} "
        f"Raise that limit or remove the row{'s' if len(long) > 1 else ''}."
    )


def _lengths(prompts: Sequence[Prompt], tokenizer: PromptTokenizer, path: str | Path) -> list[int]:
    """Tokens of each prompt. Several go to a tokenizer at once where it has `prompt_lengths`."""
    at_once: Callable[[Sequence[Conversation]], list[int]] | None = getattr(tokenizer, "prompt_lengths", None)
    lengths: list[int] = []
    with reading_progress(f"counting tokens of {Path(path).name}") as show:
        for begin in range(0, len(prompts), LENGTHS_AT_ONCE):
            part = prompts[begin : begin + LENGTHS_AT_ONCE]
            try:
                found = None if at_once is None else at_once([prompt.messages for prompt in part])
            except Exception:  # noqa: BLE001 - whatever it was: asked for one by one, the prompt at fault has a name
                found = None
            lengths += [_length(prompt, tokenizer, path) for prompt in part] if found is None else found
            show(begin + len(part), len(prompts))
    return lengths


def _length(prompt: Prompt, tokenizer: PromptTokenizer, path: str | Path) -> int:
    with rendering(f"{path} row {prompt.index}"):
        return len(tokenizer.prompt_ids(prompt.messages))


def _answer(place: str, reward_model: Any) -> str:
    if not isinstance(reward_model, dict):
        raise DataError(f"{place}: 'reward_model' is {quote(reward_model)}; needed: a struct with 'ground_truth'")
    check_keys(f"{place}: reward_model", reward_model, ("ground_truth",))
    return answer_text(place, "reward_model.ground_truth", reward_model["ground_truth"])


def _difficulty(place: str, column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: {column!r} is {quote(value)}; data.pools.column needs a number there")
    return float(value)
