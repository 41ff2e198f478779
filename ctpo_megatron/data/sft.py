"""Demonstrations for supervised teaching, as the same token streams that rollouts produce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
    emit: Emit = discard,
    hear: Callable[[TrainSample], None] | None = None,
) -> list[TrainSample]:
    """All rows of a .parquet or .jsonl file with a column `messages`: a prompt, then assistant and tool turns.

    Each assistant turn is masked in with its end token and advantage 1.0, everything else is masked out. The prompt is all
    up to the last user message. Raises DataError, naming the rows, where some are not of that form, longer than `limit`, or hold
    what the chat template does not write. `emit` hears what was read, and `hear` of each row that can be written, however long.
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
                    sample = as_sample(place, row, *as_conversation(place, messages, system_prompt), chat)
                    if hear is not None:
                        hear(sample)
                    _check_length(place, sample, limit)
                    samples.append(sample)
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
    expected = ["assistant", "tool"] * len(roles)
    if roles[start:] != expected[: len(roles) - start] or roles[-1] != "assistant":
        raise DataError(
            f"{place}: after the last user message come {', '.join(roles[start:]) or 'no messages'}; "
            "needed: assistant, then any number of (tool, assistant)"
        )
    if system_prompt is not None and "system" not in roles:
        return ({"role": "system", "content": system_prompt}, *messages), start + 1
    return messages, start


def as_sample(place: str, row: int, messages: Sequence[Message], start: int, chat: ChatEncoder) -> TrainSample:
    """Returns the conversation as tokens; taught is what the assistant says from messages[start] on. Its group is its row."""
    with rendering(place):
        prompt_ids, parts = chat.demonstration(messages, start)
    return build_sample(prompt_ids, [_turn(role == "assistant", ids) for role, ids in parts], 1.0, row)


def _turn(wrote: bool, ids: list[int]) -> Turn:
    return Turn("assistant" if wrote else "tool", ids, [0.0] * len(ids), [-1] * len(ids))


def _check_length(place: str, sample: TrainSample, limit: LengthLimit | None) -> None:
    if limit is not None and len(sample) > limit.tokens:
        raise DataError(
            f"{place}: the demonstration has {len(sample):,} tokens; allowed: {limit.words}. Raise that, or cut the row."
        )
