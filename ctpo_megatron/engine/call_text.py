"""Where calls of tools may stand in what a model wrote, and what was written there. Text only: SGLang decides what a call is.

SGLang's detectors take a whole turn and give back text and calls, and between the two some of it is lost. So a turn is cut up
here: each part that may be a call goes to the detector by itself, and what the detector cannot use stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.types import ParsedCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
THINK, THOUGHT = "<think>", "</think>"
KEYS = {"name", "arguments", "parameters", "type", "id"}  # of a call; what has others would lose them

_SPACE = re.compile(r"[ \t\n\r]*")  # of JSON
_BETWEEN = re.compile(rf"(?:\s|;|{re.escape(PYTHON_TAG)})*")
_NEXT = re.compile(rf"(?:;|{re.escape(PYTHON_TAG)})\s*(?={{)")
_FUNCTION = r"<function=[^<>\n]+>\s*(?:<parameter=[^<>\n]+>(?:(?!</?parameter|</?function).)*</parameter>\s*)*</function>\s*"
_XML = re.compile(rf"{OPEN}\s*(?:{_FUNCTION})+{CLOSE}", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may be a call: text[start:end], what the detector is given for it, and the calls that it has to find there."""

    start: int
    end: int
    block: str
    expected: tuple[ParsedCall, ...] | None  # None: the form has no JSON of its own, so it is as the detector reads it
    calls: int = 1  # how many it has to find


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Returns the reasoning that `text` begins with, None where there is none, and the rest.

    Reasoning without its end is all reasoning: the turn was cut off, or nothing came after it.
    """
    inside = text.lstrip().removeprefix(THINK)
    opened = len(inside) < len(text.lstrip())
    thought, found, rest = (inside if opened else text).partition(THOUGHT)
    if not opened and (not found or THINK in thought):
        return None, text
    return thought.strip("\n"), rest.lstrip("\n")


def tagged_json(text: str) -> Iterator[Candidate]:
    """The calls of Hermes and Qwen: JSON between tags. A tag within a string of the JSON belongs to the string."""
    place = text.find(OPEN)
    while place >= 0:
        begin = _skip(text, place + len(OPEN))
        end, calls = written_calls(text, begin)
        close = _skip(text, end)
        if calls and (text.startswith(CLOSE, close) or close == len(text)):
            stop = min(close + len(CLOSE), len(text))
            # within JSON "<" stands in strings only, and there its escape means the same
            payload = text[begin:end].replace("<", "\\u003c")
            yield Candidate(place, stop, text[place:begin] + payload + text[end:stop], calls, len(calls))
            place = text.find(OPEN, stop)
        else:
            place = text.find(OPEN, place + len(OPEN))


def tagged_xml(text: str) -> Iterator[Candidate]:
    """The calls of Qwen3-Coder: functions and their parameters as elements."""
    for found in _XML.finditer(text):
        yield Candidate(found.start(), found.end(), found[0], None, found[0].count("<function="))


def bare_json(text: str) -> Iterator[Candidate]:
    """The calls of Llama 3: objects one after the other, behind a tag or at the very beginning; also as Python writes them."""
    start = 0 if text.startswith("{") else text.find(PYTHON_TAG)
    while start >= 0:
        begin = _BETWEEN.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing too
        end, calls = begin, None
        if text.startswith("{", begin):
            end, calls = written_calls(text, begin)
            as_python = end == begin
            end = _closing_brace(text, begin) if as_python else end
            if end > begin and (calls or as_python):
                yield Candidate(start, end, PYTHON_TAG + text[begin:end], calls)
        if end > begin and text.startswith("{", _BETWEEN.match(text, end).end()):  # type: ignore[union-attr]
            start = end
        else:
            following = _NEXT.search(text, max(end, begin))
            start = following.start() if following else -1


FORMS: dict[str, Callable[[str], Iterator[Candidate]]] = {
    "hermes": tagged_json,
    "qwen25": tagged_json,
    "qwen3_coder": tagged_xml,
    "llama3": bare_json,
}


def written_calls(text: str, begin: int) -> tuple[int, tuple[ParsedCall, ...] | None]:
    """Returns where the JSON at `begin` ends, and the calls that it is: an object or a list of them; None where it is no calls.

    What JSON leaves open (a key given twice, NaN, half a character) is no call; where there is no JSON the end is `begin`.
    """
    end = begin
    try:
        _, end = json.JSONDecoder().raw_decode(text, begin)
        value, _ = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return end, None
    if not is_json(value):
        return end, None
    if not isinstance(value, list):
        found = _call(value, text, begin)
        return end, None if found is None else (found,)
    calls = [_call(each, text, place) for each, place in zip(value, _items(text, begin), strict=True)]
    return end, None if not calls or None in calls else tuple(call for call in calls if call is not None)


def is_json(value: Any) -> bool:
    """Whether a value that Python made of text can be written as JSON in UTF-8: no NaN, infinity or half of a character."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def sound_object(value: Any) -> bool:
    """Whether `value` is a call of which nothing is lost when its name and its arguments are taken."""
    if not isinstance(value, dict) or not set(value) <= KEYS or not isinstance(value.get("name"), str):
        return False
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    return len(given) <= 1 and all(isinstance(each, dict) for each in given)


def parameters_are_unique(block: str) -> bool:
    """Whether no function in a block of elements is given a parameter twice."""
    named = [_PARAMETER.findall(part) for part in block.split("</function>")]
    return all(len(set(names)) == len(names) for names in named)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is given twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _call(value: Any, text: str, begin: int) -> ParsedCall | None:
    if not sound_object(value):
        return None
    members = dict(_members(text, begin))
    return ParsedCall(value["name"], members.get("arguments", members.get("parameters", "{}")))


def _members(text: str, begin: int) -> Iterator[tuple[str, str]]:
    """The keys of the JSON object at `begin`, which is sound, with the text of their values."""
    place = _skip(text, begin + 1)
    while text[place] != "}":
        key, place = _DECODER.raw_decode(text, place)
        start = _skip(text, _skip(text, place) + 1)
        _, end = _DECODER.raw_decode(text, start)
        yield key, text[start:end]
        place = _skip(text, end)
        place = _skip(text, place + 1) if text[place] == "," else place


def _items(text: str, begin: int) -> Iterator[int]:
    """Where the items of the JSON list at `begin`, which is sound, begin."""
    place = _skip(text, begin + 1)
    while text[place] != "]":
        yield place
        _, end = _DECODER.raw_decode(text, place)
        place = _skip(text, end)
        place = _skip(text, place + 1) if text[place] == "," else place


def _closing_brace(text: str, begin: int) -> int:
    """Where the braces that open at `begin` are all closed, as SGLang counts them; `begin` where they are not."""
    depth = 0
    for found in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return begin + found.end()
    return begin


def _skip(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing too
