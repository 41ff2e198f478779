"""What a text of the model says: reasoning, content, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A call of a tool that the model wrote and that can be used. `arguments` is the JSON text of an object, as it was."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the assistant wrote in one turn, in its parts. What is no usable call is in `content`; None: it wrote no reasoning."""

    content: str
    reasoning: str | None = None
    calls: tuple[ParsedCall, ...] = ()
