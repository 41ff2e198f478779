"""Who wrote which part of a rendered conversation: its messages' authors, or the chat template around them.

The template is asked, not taken apart: the conversation is rendered a second time with a word of our own in place of each
content. What stands around those words is the template's, and what stands between the same surroundings in the real text is
the author's, also where the template trims, quotes or moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

Message = dict[str, Any]
Author = Literal["system", "user", "assistant", "tool", "template"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of a sample as text, all of them trained on or none. `ends`: it is a stop token that was trained on."""

    text: str
    trained: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Text by one author. `trained`: the model is taught to write it; `ends_turn`: it is the token that ends its turn."""

    author: Author
    text: str
    trained: bool = False
    ends_turn: bool = False


@dataclass(frozen=True, slots=True)
class _Span:
    author: Author
    start: int
    stop: int


def runs_of(
    tokens: Sequence[int], trained: Sequence[bool], stops: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[Run]:
    """Returns a sample's tokens as runs. `trained[i]` says whether token i is; `stops` are the tokens that end a turn."""
    kinds = [(flag, flag and token in stops) for token, flag in zip(tokens, trained, strict=True)]
    numbered = groupby(range(len(tokens)), key=lambda place: (*kinds[place], place if kinds[place][1] else -1))
    return [Run(decode([tokens[place] for place in places]), flag, ends) for (flag, ends, _), places in numbered]


def parts_of(runs: Sequence[Run], messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> list[Part]:
    """Returns the text of `runs` cut into parts. What is trained on is the assistant's own, whatever the template wrote into it.

    `render` gives the text of all runs for other contents of the same `messages`.
    """
    spans = _spans("".join(run.text for run in runs), messages, render)
    parts: list[Part] = []
    begun = 0
    for run in runs:
        stop = begun + len(run.text)
        if run.trained:
            parts.append(Part("assistant", run.text, trained=True, ends_turn=run.ends))
        else:
            parts += (Part(author, run.text[a - begun : b - begun]) for author, a, b in _within(spans, begun, stop))
        begun = stop
    return parts


def _within(spans: Sequence[_Span], start: int, stop: int) -> Iterator[tuple[Author, int, int]]:
    """Yield all of start to stop: the spans there, and the template between them."""
    for span in spans:
        a, b = max(span.start, start), min(span.stop, stop)
        if a < b:
            if start < a:
                yield "template", start, a
            yield span.author, a, b
            start = b
    if start < stop:
        yield "template", start, stop


def _spans(text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> list[_Span]:
    """Where in `text` each message's content stands, in order."""
    words = [_word(number, text) for number in range(len(messages))]
    said = [number for number, message in enumerate(messages) if message.get("content")]
    changed = [{**each, "content": words[number]} if number in said else each for number, each in enumerate(messages)]
    try:
        pattern = render(changed)
    except Exception:  # noqa: BLE001 - a template may refuse other words; then contents are looked for as they are
        return _searched(text, messages)
    if any(pattern.count(words[number]) != 1 for number in said):
        return _searched(text, messages)
    said.sort(key=lambda number: pattern.index(words[number]))  # some templates move the system message
    return _matched(text, pattern, [(words[number], messages[number]) for number in said]) or _searched(text, messages)


def _word(number: int, text: str) -> str:
    """A word that `text` does not hold, which no template would trim, quote or change."""
    word = f"wordsof{'abcdefghij'[number % 10] * (number // 10 + 1)}here"
    while word in text:
        word += "e"
    return word


def _matched(text: str, pattern: str, said: Sequence[tuple[str, Message]]) -> list[_Span] | None:
    """Spans of `text` that stand where `pattern` has the words of `said`; None where the surroundings are others."""
    spans = []
    rest, place = pattern, 0
    for number, (word, message) in enumerate(said):
        before, _, rest = rest.partition(word)
        if not text.startswith(before, place):
            return None
        place += len(before)
        after = rest.partition(said[number + 1][0])[0] if number + 1 < len(said) else rest
        stop = _stop(text, place, message["content"], after, last=number + 1 == len(said))
        if stop is None:
            return None
        spans.append(_Span(message["role"], place, stop))
        place = stop
    return spans


def _stop(text: str, start: int, content: Any, after: str, *, last: bool) -> int | None:
    """Where the content that begins at `start` ends: as it is written, otherwise where the surroundings go on."""
    for form in (content, content.strip()) if isinstance(content, str) else ():
        stop = start + len(form)
        if text.startswith(form, start) and text.startswith(after, stop) and (not last or stop + len(after) == len(text)):
            return stop
    stop = len(text) - len(after) if last else text.find(after, start)
    return stop if start <= stop and text.startswith(after, stop) else None


def _searched(text: str, messages: Sequence[Message]) -> list[_Span]:
    """Spans of the contents that `text` has word for word, each after the one before."""
    spans, place = [], 0
    for message in messages:
        content = message.get("content")
        form = content.strip() if isinstance(content, str) else ""
        start = text.find(form, place) if form else -1
        if start >= 0:
            place = start + len(form)
            spans.append(_Span(message["role"], start, place))
    return spans
