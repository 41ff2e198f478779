"""Demonstrations for supervised teaching, as the same token streams that rollouts produce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ctpo_megatron.data.complaints import Complaints
from ctpo_megatron.data.messages import Message, check_messages, rendering
from ctpo_megatron.data.samples import build_sample
from ctpo_megatron.data.tables import Table
from ctpo_megatron.errors import DataError
from ctpo_megatron.record.events import DataRead, Emit, discard
from ctpo_megatron.types import TrainSample, Turn

COLUMNS = ("messages",)
ROLES = ("system", "user", "assistant", "tool")
AT_ONCE = 512  # rows between two moves of the progress bar
ANSWER = ("assistant", "tool")

Taught = Literal["last", "all"]
"""Which of a conversation's answers are taught: that to the last user message, or those to all of them."""


class ChatEncoder(Protocol):
    """Makes of a conversation the tokens that a rollout of it would have."""

    def demonstration(self, messages: Sequence[Message], start: int) -> tuple[list[int], list[tuple[str, list[int]]]]:
        """Token ids of the prompt messages[:start], and (role, ids) of what follows, assistant and tool by turns."""
        ...


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How many tokens a demonstration may have, and the words of the configuration that say so."""

    tokens: int
    words: str


def read_demonstrations(
    path: str | Path,
    chat: ChatEncoder,
    *,
    system_prompt: str | None = None,
    limit: LengthLimit | None = None,
    turns: Taught = "last",
    emit: Emit = discard,
    hear: Callable[[TrainSample], None] | None = None,
) -> list[TrainSample]:
    """All rows of a .parquet or .jsonl file with a column `messages`: a prompt, then assistant and tool turns.

    Each assistant turn behind the last user message, or with `turns="all"` behind each, is masked in with its end token and
    advantage 1.0, everything else is masked out. A row is one sample, or several: see `as_samples`. Raises DataError, naming the
    rows, where some are not of that form, longer than `limit`, or hold what the chat template does not write. `emit` hears what
    was read, and `hear` of each sample that can be written, however long.
    """
    table, complaints = Table(path, COLUMNS, at_once=AT_ONCE), Complaints(path)
    samples: list[TrainSample] = []
    row = 0
    known: set[int] = set()
    with closing(table.batches()) as batches:
        for batch in batches:
            for number, distinct in enumerate(batch.numbers.tolist()):
                place, messages = batch.place(number), batch.rows[distinct]["messages"]
                known.add(hash(repr(messages)))
                try:
                    of_row = as_samples(place, row, *as_conversation(place, messages, system_prompt), chat, turns)
                    for sample in of_row:
                        if hear is not None:
                            hear(sample)
                    for sample in of_row:
                        _check_length(place, sample, limit)
                    samples += of_row
                except DataError as error:
                    complaints.add(str(error))
                row += 1
    emit(DataRead(str(path), table.rows, len(known), table.ignored))
    complaints.settle(table.rows)
    return samples


def as_conversation(place: str, found: Any, system_prompt: str | None) -> tuple[tuple[Message, ...], int]:
    """Returns what a cell of the column `messages` holds as a conversation, and where in it the assistant begins to be taught.

    `system_prompt` comes before a conversation without a system message. Raises DataError where it is of another form.
    """
    messages = check_messages(place, "messages", found, ROLES)
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise DataError(f"{place}: 'messages' has no user message; found roles: {', '.join(roles)}")
    start = len(roles) - roles[::-1].index("user")
    _check_answer(place, "after the last user message", roles[start:])
    if system_prompt is not None and "system" not in roles:
        return ({"role": "system", "content": system_prompt}, *messages), start + 1
    return messages, start


def as_samples(
    place: str, row: int, messages: Sequence[Message], start: int, chat: ChatEncoder, turns: Taught = "last"
) -> list[TrainSample]:
    """Returns the conversation as tokens; taught is what the assistant says from messages[start] on. The group is the row.

    `turns="all"`: what it says behind earlier user messages too, each answer with the prompt that it would have had. Answers
    share a sample where the later prompt begins with the tokens of the earlier one and its answer. A template that writes earlier
    turns otherwise, such as without their reasoning, gives a sample of its own to each.
    """
    spans = [*(_earlier_answers(place, messages[: start - 1]) if turns == "all" else ()), (start, len(messages))]
    found: list[tuple[list[int], list[Turn]]] = []  # prompt, and what follows it
    for begin, end in spans:
        with rendering(place):
            prompt_ids, parts = chat.demonstration(messages[:end], begin)
        answer = [_turn(role == "assistant", ids) for role, ids in parts]
        if found and (between := _behind(found[-1], prompt_ids)) is not None:
            found[-1][1].extend([_turn(False, between), *answer] if between else answer)
        else:
            found.append((prompt_ids, answer))
    return [build_sample(prompt_ids, said, 1.0, row) for prompt_ids, said in found]


def _earlier_answers(place: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Returns begin and end of what the assistant says behind each user message. Raises DataError where tools interrupt it."""
    found: list[tuple[int, int]] = []
    roles = [message["role"] for message in messages]
    for begin in range(1, len(roles)):
        if roles[begin - 1] == "user" and roles[begin] in ANSWER:
            end = next((place for place in range(begin, len(roles)) if roles[place] not in ANSWER), len(roles))
            _check_answer(place, f"after message {begin - 1}", roles[begin:end])
            found.append((begin, end))
    return found


def _behind(before: tuple[list[int], list[Turn]], prompt_ids: list[int]) -> list[int] | None:
    """Returns what a prompt has behind an earlier prompt with its answer; None where it does not begin with them."""
    prompt, said = before
    whole = [*prompt, *(id_ for turn in said for id_ in turn.token_ids)]
    return prompt_ids[len(whole) :] if prompt_ids[: len(whole)] == whole else None


def _check_answer(place: str, where: str, roles: Sequence[str]) -> None:
    if list(roles) != (list(ANSWER) * len(roles))[: len(roles)] or not roles or roles[-1] != "assistant":
        raise DataError(
            f"{place}: {where} come {', '.join(roles) or 'no messages'}; needed: assistant, then any number of (tool, assistant)"
        )


def _turn(wrote: bool, ids: list[int]) -> Turn:
    return Turn("assistant" if wrote else "tool", ids, [0.0] * len(ids), [-1] * len(ids))


def _check_length(place: str, sample: TrainSample, limit: LengthLimit | None) -> None:
    if limit is not None and len(sample) > limit.tokens:
        raise DataError(
            f"{place}: the demonstration has {len(sample):,} tokens; allowed: {limit.words}. Raise that, or cut the row."
        )
