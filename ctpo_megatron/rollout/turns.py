"""A written conversation as the turns of a rollout: what the assistant said, and what the template wrote between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.template import ChatTemplate, Message
from ctpo_megatron.rollout.tokens import MARK, Tokens

_ASSISTANT = "assistantsaysthis"
SHOWN = 70  # characters before and after a difference that a message quotes


@dataclass(frozen=True, slots=True)
class SpokenTurn:
    """One turn of the assistant. Text is as the template wrote it, with marks in names of special tokens that others wrote."""

    head: str  # all that stands before it: it ends where the model would begin to write
    opening: str  # the end of `head` that the template adds for a generation
    body: str  # what the assistant wrote
    end: str  # the stop token that it ended with
    tail: str  # what follows `body` up to the next turn, the template's end of the turn included; empty after the last

    @property
    def between(self) -> str:
        """What follows the assistant's stop token, up to its next turn."""
        return self.tail.removeprefix(self.end)


class TurnReader:
    """Cuts conversations into turns, each as it was when the assistant wrote it."""

    def __init__(self, template: ChatTemplate, tokens: Tokens) -> None:
        self._template = template
        self._tokens = tokens

    def read(self, messages: Sequence[Message], start: int) -> list[SpokenTurn]:
        """The turns from messages[start] on, where assistant and tools take turns. Raises RenderError.

        A name of a special token in these messages is plain text; in those before, it is the token.
        """
        marked = [*messages[:start], *(self._tokens.mark(message) for message in messages[start:])]
        self._check_marks(messages, marked)
        starts = [place for place in range(start, len(marked)) if marked[place]["role"] == "assistant"]
        turns: list[SpokenTurn] = []
        for place, after in zip(starts, [*starts[1:], None], strict=True):
            turns.append(self._turn(marked, place, after, turns[-1].tail if turns else ""))
        return turns

    @cached_property
    def lead(self) -> str:
        """What the template writes before the words of a last turn that has no reasoning, such as an empty think block."""
        question: list[Message] = [{"role": "user", "content": "question"}]
        try:
            head = self._template.render(question, prompt=True)
            body, _ = self.own_words([*question, {"role": "assistant", "content": _ASSISTANT}], head)
        except RenderError:
            return ""
        return body.partition(_ASSISTANT)[0]

    def opening(self, messages: Sequence[Message], head: str) -> str:
        """The part of `head`, a rendered prompt of `messages`, that is there for a generation only."""
        plain = self._template.render(messages, prompt=False)
        return head[len(plain) :] if head.startswith(plain) else ""

    def own_words(self, messages: Sequence[Message], head: str, near: str = "") -> tuple[str, str | None]:
        """Text of the last message's turn after `head`, less its end, and the stop token at its end where there is one.

        A template may write earlier turns otherwise once this one is there; then the turn begins after `near`, what was written
        since the turn before it.
        """
        written = self._template.render(messages, prompt=False)
        if not written.startswith(head) and near and near in written:
            head = written[: written.rindex(near) + len(near)]
        if not written.startswith(head):
            raise RenderError(
                f"{self._template.name} does not write the assistant's turn where a generation would begin it, so the turn "
                f"cannot be taught. {difference(head, written, 'where a generation begins', 'with the turn')}"
            )
        body = written[len(head) :]
        end = self._tokens.find_end(body)
        if end is None:
            return body, None
        if rest := body[end.end() :].strip():
            raise RenderError(
                f"{self._template.name} writes {rest[:SHOWN]!r} after the stop token of the turn, where nothing is read"
            )
        return body[: end.start()], end[0]

    def _turn(self, messages: list[Message], place: int, after: int | None, near: str) -> SpokenTurn:
        head = self._template.render(messages[:place], prompt=True)
        body, end = self.own_words(messages[: place + 1], head, near)
        opening = self.opening(messages[:place], head)
        self._check_words(messages[place], opening + body)
        following = messages[place + 1 : after] or [{"role": "user", "content": "question"}]
        tail = ""
        if after is not None or end is None:
            tail = self._tail(messages[:place], messages[place], following, head + body)
        if end is None:
            found = self._tokens.find_end(tail)
            if found is None or found.start():
                raise self._no_end(tail)
            end = found[0]
        return SpokenTurn(head, opening, body, end, tail if after is not None else "")

    def _check_words(self, message: Message, written: str) -> None:
        """Raise RenderError where a word of the assistant's content is missing in what the template wrote of it."""
        content, place = message.get("content"), 0
        if not isinstance(content, str):
            return
        for word in content.split():
            found = written.find(word, place)
            if found < 0:
                raise RenderError(
                    f"{self._template.name} leaves {word[:SHOWN]!r} out of the assistant's content. "
                    f"{difference(content, written, 'as given', 'by the template')}. Give a template that writes it "
                    "with model.chat_template, or take it out"
                )
            place = found + len(word)

    def _tail(self, before: list[Message], turn: Message, following: list[Message], so_far: str) -> str:
        """What the template writes after the words of `turn`, through `following`, up to the next turn."""
        written = self._template.render([*before, turn, *following], prompt=True)
        if written.startswith(so_far):
            return written[len(so_far) :]
        # the template writes an earlier turn in other words than the last: find its end behind words that it cannot change
        plain = {key: value for key, value in turn.items() if key in ("role", "tool_calls")} | {"content": _ASSISTANT}
        _, found, tail = self._template.render([*before, plain, *following], prompt=True).partition(_ASSISTANT)
        if "tool_calls" in plain and (end := self._tokens.find_end(tail)) is not None:
            tail = tail[end.start() :]  # the calls belong to the turn
        if not found or not written.endswith(tail):
            raise RenderError(
                f"{self._template.name} writes an earlier turn otherwise than the last one. "
                f"{difference(so_far, written, 'the last turn', 'an earlier one')}"
            )
        return tail

    def _no_end(self, tail: str) -> RenderError:
        known = list(self._tokens.ends)
        return RenderError(
            f"{self._template.name} ends the assistant's turn with none of the stop tokens {known}; it writes "
            f"{tail[:SHOWN]!r} after it. Add the token that ends this turn to model.stop_tokens."
        )

    def _check_marks(self, messages: Sequence[Message], marked: list[Message]) -> None:
        if marked == list(messages):
            return
        plain = self._template.render(messages, prompt=False)
        if self._template.render(marked, prompt=False).replace(MARK, "") != plain:
            raise RenderError(
                f"{self._template.name} treats a message otherwise because the name of a special token is written in it "
                f"({', '.join(sorted(set(self._tokens.specials(repr(messages)))))} are special); take the name out"
            )


def common_start(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if one.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def difference(ours: str, theirs: str, ours_is: str, theirs_is: str) -> str:
    """A sentence that shows two texts around the first character in which they differ."""
    ours, theirs = ours.replace(MARK, ""), theirs.replace(MARK, "")
    place = common_start(ours, theirs)
    shown = [f"{'...' if place > SHOWN else ''}{text[max(0, place - SHOWN) : place + SHOWN]}" for text in (ours, theirs)]
    return f"They differ at character {place}: {ours_is} it reads {shown[0]!r}, {theirs_is} it reads {shown[1]!r}"
