"""SGLang's own detectors of tool calls, as a parser that loses nothing.

What SGLang 0.5.23 does with a whole turn, and why it is given one call at a time instead:

    qwen25         drops a call that it cannot use, and all text between and after calls
    hermes         keeps no call at all where one of several is not JSON; drops text between and after calls
    qwen3_coder    drops what it cannot read, and text after calls; takes names that no tool has
    llama3         raises AttributeError where JSON that is no object stands behind its tag; drops an object that is no call
    all            drop calls of tools that are not there, `arguments` that are empty or are there beside `parameters`, other keys

tests/unit/engine/test_parsers.py tells when these are no longer so. A format of call_text.FORMS is a name of SGLang's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ctpo_megatron.engine.call_text import (
    FORMS,
    PYTHON_TAG,
    Candidate,
    is_json,
    parameters_are_unique,
    sound_object,
    split_reasoning,
)
from ctpo_megatron.engine.sglang.imports import environment_stays, hide_kernels
from ctpo_megatron.imports import modules_stay
from ctpo_megatron.types import Parsed, ParsedCall

# what SGLang's detectors, made for what models should write, raise at what they do write
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class SGLangCallParser:
    """Implements `rollout.protocols.CallParser` for one format: hermes, qwen25, qwen3_coder or llama3.

    `thinks`: whether the model's template knows reasoning between think tags. Raises ValueError for another format.
    """

    def __init__(self, form: str, *, thinks: bool = False) -> None:
        if form not in FORMS:
            raise ValueError(f"no parser of tool calls is called {form!r}; allowed: {', '.join(FORMS)}")
        self._candidates: Callable[[str], Iterator[Candidate]] = FORMS[form]
        self._thinks = thinks
        hide_kernels()
        with environment_stays(), modules_stay():
            from sglang.srt.entrypoints.openai.protocol import Tool
            from sglang.srt.function_call.function_call_parser import FunctionCallParser
            from sglang.srt.function_call.utils import safe_literal_eval
        # it warns of each call that it cannot use, with the model's words; here that is no loss, and in a run no news
        logging.getLogger("sglang.srt.function_call").setLevel(logging.CRITICAL)
        self._detector: Any = FunctionCallParser.ToolCallParserEnum[form]()
        self._tool: Any = Tool
        self._literal: Any = safe_literal_eval
        self._known: tuple[list[dict[str, Any]], list[Any]] = [], []  # the newest tools, as given and as SGLang's

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> Parsed:
        """Returns the parts of a turn (`rollout.protocols.CallParser.parse`). Raises ValueError for tools of another form."""
        reasoning, rest = split_reasoning(text) if self._thinks else (None, text)
        theirs = self._theirs(tools)
        calls: list[ParsedCall] = []
        left, place = [], 0
        for candidate in self._candidates(rest) if theirs else ():
            found = self._read(candidate, theirs)
            if found:
                calls += found
                left.append(rest[place : candidate.start])
                place = candidate.end
        left.append(rest[place:])
        content = "".join(left)
        return Parsed(content.strip() if calls else content, reasoning, tuple(calls))

    def _theirs(self, tools: Sequence[dict[str, Any]]) -> list[Any]:
        """`tools` as SGLang's, the newest ones remembered."""
        if self._known[0] != list(tools):
            self._known = list(tools), [self._tool.model_validate(tool) for tool in tools]  # pydantic's error is a ValueError
        return self._known[1]

    def _read(self, candidate: Candidate, tools: list[Any]) -> tuple[ParsedCall, ...]:
        """The calls that SGLang finds in `candidate` where they are all that is in it, none otherwise."""
        try:
            result = self._detector.detect_and_parse(candidate.block, tools)
            names = [call.name for call in result.calls]
            values = [json.loads(call.parameters) for call in result.calls]
        except FAILURES:
            return ()
        if result.normal_text or len(names) != candidate.calls or not {*names} <= {tool.function.name for tool in tools}:
            return ()
        if candidate.expected is not None:
            wanted = [(call.name, json.loads(call.arguments)) for call in candidate.expected]
            return candidate.expected if wanted == list(zip(names, values, strict=True)) else ()
        if not self._is_whole(candidate.block) or not all(map(is_json, values)):
            return ()
        return tuple(ParsedCall(call.name, call.parameters) for call in result.calls)

    def _is_whole(self, block: str) -> bool:
        """Whether what SGLang takes of a block that is not JSON is all of it."""
        if not block.startswith(PYTHON_TAG):
            return parameters_are_unique(block)
        try:
            return sound_object(self._literal(block.removeprefix(PYTHON_TAG)))
        except FAILURES:
            return False
