"""What a worker calls, what it makes of what comes back, and what it refuses before the first attempt."""

from __future__ import annotations

from typing import Any

import pytest

from ctpo_megatron.agents.adapters.verifiers import NAME
from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.agents.play.worker import answer_of, load

FUNCTIONS = "tests.support.agent_functions"
TASK = AgentTask("http://h/a/v1", "http://h/a", "sk-k", "m", [{"role": "user", "content": "hello"}], "g0.0", 5.0)


def test_a_function_gets_its_options() -> None:
    assert load(f"{FUNCTIONS}:greets", {"name": "Ada"})(TASK) == "Ada, hello"


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("greets", {}, "options (none): missing a required argument: 'name'"),
        ("greets", {"nam": 1}, "options (nam): "),
        ("greets", {"task": 1, "name": "x"}, "multiple values for argument 'task'"),
        ("Counts", {}, "missing a required argument: 'of'"),
        ("Idle", {}, "a class without __call__"),
        ("no_function", {}, "is a int; needed: a function"),
    ],
)
def test_what_cannot_be_called_is_refused(path: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as refused:
        load(f"{FUNCTIONS}:{path}", options)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("said", "text", "reward"),
    [
        (None, None, None),
        ("four", "four", None),
        ({"text": "four", "reward": 1}, "four", 1.0),
        ({"reward": -0.5}, None, -0.5),
        ({"text": "four"}, "four", None),
    ],
)
def test_answers(said: Any, text: str | None, reward: float | None) -> None:
    assert answer_of(said) == {"text": text, "reward": reward}


@pytest.mark.parametrize(
    "said", [5, b"x", ("a",), {"txt": "a"}, {"text": 4}, *({"reward": r} for r in (True, "1", float("nan")))]
)
def test_what_is_no_answer_is_refused(said: Any) -> None:
    with pytest.raises(TypeError, match="needed: "):
        answer_of(said)


def test_without_verifiers_it_is_said_what_to_do() -> None:
    with pytest.raises(ImportError, match=r"verifiers 0\.4.*rollout\.agent\.python"):
        load(f"{NAME}:Player", {"env": {}})
