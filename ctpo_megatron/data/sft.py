"""Demonstrations for supervised teaching, as the same token streams that rollouts produce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ctpo_megatron.data.samples import build_sample
from ctpo_megatron.data.tables import check_messages, read_rows
from ctpo_megatron.errors import DataError, RenderError
from ctpo_megatron.types import TrainSample, Turn

ROLES = ("system", "user", "assistant", "tool")


class ChatEncoder(Protocol):
    """Makes of a conversation the tokens that a rollout of it would have."""

    def demonstration(self, messages: Sequence[dict[str, Any]], start: int) -> tuple[list[int], list[tuple[str, list[int]]]]:
        """Token ids of the prompt messages[:start], and (role, ids) of what follows, assistant and tool by turns."""
        ...


def read_demonstrations(path: str | Path, chat: ChatEncoder, *, system_prompt: str | None = None) -> list[TrainSample]:
    """All rows of a .parquet or .jsonl file with a column `messages`: a prompt, then assistant and tool turns.

    Each assistant turn is masked in with its end token and advantage 1.0, everything else is masked out. The prompt is all
    up to the last user message. Raises DataError, naming the row, where a row is not of that form.
    """
    return [
        _sample(place, index, check_messages(place, "messages", row["messages"], ROLES), chat, system_prompt)
        for index, (place, row) in enumerate(read_rows(path, ("messages",)))
    ]


def _sample(
    place: str, index: int, messages: tuple[dict[str, Any], ...], chat: ChatEncoder, system_prompt: str | None
) -> TrainSample:
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
    prompt = messages[:start]
    if system_prompt is not None and "system" not in roles:
        prompt = ({"role": "system", "content": system_prompt}, *prompt)
    try:
        prompt_ids, parts = chat.demonstration([*prompt, *messages[start:]], len(prompt))
    except RenderError as error:
        raise DataError(f"{place}: {error}") from error
    return build_sample(prompt_ids, [_turn(role == "assistant", ids) for role, ids in parts], 1.0, index)


def _turn(wrote: bool, ids: list[int]) -> Turn:
    return Turn("assistant" if wrote else "tool", ids, [0.0] * len(ids), [-1] * len(ids))
