"""Every parameter of the clients that are installed has a rule, and the documentation has the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import anthropic.types.message_create_params as anthropic_params
import openai.types.chat.completion_create_params as openai_params
import pytest

from ctpo_megatron.agents.http.parameters import ANTHROPIC, OPENAI, Rules, not_applied, table
from ctpo_megatron.agents.http.refusals import Refusal

PAGE = Path(__file__).resolve().parents[4] / "docs" / "agents_http.md"
NEWER = {"diagnostics", "user_profile_id", "workspace_id"}  # of Anthropic's, unknown here and so refused


def test_all_parameters_of_the_installed_clients_have_a_rule() -> None:
    given = set(get_type_hints(openai_params.CompletionCreateParamsBase))
    assert given - OPENAI.keys() == set()
    assert set(anthropic_params.MessageCreateParamsBase.__annotations__) - ANTHROPIC.keys() <= NEWER


@pytest.mark.parametrize("rules", [OPENAI, ANTHROPIC])
def test_the_page_has_the_table(rules: Rules) -> None:
    assert table(rules) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"temperature": 0.0, "top_p": None, "stop": [], "n": 1, "logit_bias": {}, "user": "u"}, ("temperature",)),
        ({"reasoning_effort": "none", "tool_choice": "auto", "parallel_tool_calls": True}, ()),
        ({"reasoning_effort": "high", "tool_choice": "none", "parallel_tool_calls": False, "seed": 0}, "all"),
        ({"response_format": {"type": "text"}, "presence_penalty": 0.0}, ()),
    ],
)
def test_what_is_not_applied_is_told(body: dict[str, Any], found: Any) -> None:
    assert not_applied(body, OPENAI, ()) == (tuple(body) if found == "all" else found)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"n": 2}, "n = 2 is refused"),
        ({"response_format": {"type": "json_object"}}, "grammar"),
        ({"logit_bias": {"5": -100}}, "own distribution"),
        ({"temprature": 1}, "'temprature' is no parameter of this endpoint. Did you mean 'temperature'"),
        ({"functions": [{"name": "f"}]}, "use `tools`"),
    ],
)
def test_what_is_refused_says_why_and_can_be_overlooked(body: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        not_applied(body, OPENAI, ())
    assert not_applied(body, OPENAI, tuple(body)) == tuple(body)


def test_a_name_that_is_overlooked_cannot_break_a_header() -> None:
    assert not_applied({"a\r\nb: c": 1}, OPENAI, ("a\r\nb: c",)) == ("abc",)
