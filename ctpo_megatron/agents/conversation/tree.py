"""What was sampled in one attempt: turns, each after another one or at the beginning of a conversation. Plain data.

    what somebody said -> turn -> what somebody said -> turn
                            └---> what somebody else said -> turn           a history that went on otherwise: a branch

A turn holds the ids that were rendered before it, since the turn that it follows, and those that were sampled. So each id is
there once, and a branch is a way from the beginning to a turn that none follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ctpo_megatron.agents.conversation.echo import echoes
from ctpo_megatron.agents.conversation.messages import same
from ctpo_megatron.agents.protocols import Message, ToolCall
from ctpo_megatron.rollout.arrays import from_array, to_array
from ctpo_megatron.types import Generation, Status


@dataclass(slots=True)
class SampledTurn:
    """One turn of the assistant, whole or not yet."""

    number: int  # in the order of requests
    after: int | None  # the number of the turn that it follows; None: it begins a conversation
    said: list[Message]  # since that turn, or from the beginning on
    tools: list[dict[str, Any]]  # that could be called; of a turn that begins a conversation, and all that follow it
    rendered: list[int]  # ids of what was said, up to where the assistant begins
    digest: str  # of the request
    allowed: int  # tokens that it may have
    stop: list[str]  # texts that end it
    sampled: Generation = field(default_factory=Generation)
    whole: bool = False
    delivered: bool = False  # whether its answer went out
    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


@dataclass(slots=True)
class Tree:
    """All turns of an attempt, in the order of their requests. `name` is the attempt's."""

    name: str
    turns: list[SampledTurn] = field(default_factory=list)
    refused: Status | None = None  # for which the last request got no turn

    def way(self, number: int | None) -> list[SampledTurn]:
        """Returns the turns from the beginning of a conversation to turn `number`; none for None."""
        way: list[SampledTurn] = []
        while number is not None:
            way.append(self.turns[number])
            number = way[-1].after
        return way[::-1]

    def call_ids(self) -> set[str]:
        """Returns the ids of all calls that were sampled."""
        return {call.id for turn in self.turns for call in turn.calls}

    def newest(self, digest: str) -> SampledTurn | None:
        """Returns the last turn that a request of this digest got."""
        return next((turn for turn in reversed(self.turns) if turn.digest == digest), None)

    def find(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[int | None, int]:
        """Returns the last turn that a history repeats word for word, None for none, and how many messages are up to there.

        Among turns that say the same it is the newest one; calls with ids that were given out belong to one turn only.
        """
        best: tuple[int, int, int | None] = (0, -1, None)  # depth, number, turn
        length = 0
        followers: dict[int | None, list[SampledTurn]] = {}
        for turn in self.turns:
            if turn.whole and (turn.after is not None or turn.tools == list(tools)):
                followers.setdefault(turn.after, []).append(turn)
        known = self.call_ids()
        open_ = [(1, 0, turn) for turn in followers.get(None, [])]
        while open_:
            depth, start, turn = open_.pop()
            place = start + len(turn.said)
            if place >= len(messages) or not all(map(same, turn.said, messages[start:place])):
                continue
            if not _is_echo(turn, messages[place], known):
                continue
            if (depth, turn.number) > best[:2]:
                best, length = (depth, turn.number, turn.number), place + 1
            open_ += [(depth + 1, place + 1, each) for each in followers.get(turn.number, [])]
        return best[2], length

    def dump(self) -> bytes:
        """Returns all of it, for `parse`."""
        return _ENCODER.encode(self)

    @classmethod
    def parse(cls, data: bytes) -> Tree:
        """Returns what `dump` gave. Raises msgspec.DecodeError for anything else."""
        return _DECODER.decode(data)


def tokens(way: Sequence[SampledTurn]) -> list[int]:
    """Returns the ids of a way, its last turn included."""
    return [id_ for turn in way for ids in (turn.rendered, turn.sampled.token_ids) for id_ in ids]


def _is_echo(turn: SampledTurn, message: Message, known: set[str]) -> bool:
    theirs = {call["id"] for call in message.get("tool_calls", [])} & known
    if theirs - {call.id for call in turn.calls}:
        return False  # it is another turn, or parts of several
    return echoes(turn.content, turn.reasoning, turn.calls, message)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=from_array)
_DECODER = msgspec.msgpack.Decoder(Tree, dec_hook=to_array)
