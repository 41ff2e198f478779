"""Histories in the words of their clients: one trajectory where they say the same, a stated branch where they do not."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctpo_megatron.agents.conversation.messages import arguments_value, fitted
from ctpo_megatron.agents.protocols import AgentAnswer, Message
from ctpo_megatron.data.samples import build_samples
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Trajectory
from tests.support.agents import QUESTION, Play, hermes, results
from tests.support.chats import loader
from tests.support.echoes import MANGLES
from tests.support.often import often
from tests.support.trajectories import group_of

LINES = [
    "It is 2.",
    "",
    " Two  lines:\n\n    with  space \n",
    "<think>\nI add 1 and 1.\n</think>\n\nIt is 2.",
    "<think>\nOnly a thought.\n</think>\n\n",
    "<code>\nprint('é <|im_end|> x')",
    hermes("add", '{"a": 1, "b": [1.5, {"c": 10000000000000000}], "t": true, "s": "é\\u00e9 \\"q\\""}'),
    "Both.\n" + hermes("add", '{"a": 1}') + "\n" + hermes("add", '{"a":  2 , "b": -0.0}'),
    "<think>\nA call.\n</think>\n\n" + hermes("add", "{}"),
    hermes("add", '{"a": 1,'),
]


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> ChatTokenizer:
    return loader(lambda: tmp_path_factory.mktemp("model") / "m")("qwen2.5")


def after(answer: AgentAnswer, number: int) -> list[Message]:
    """What comes back to a turn."""
    if answer.calls:
        return results(answer, *(f"output {number}.{place}" for place in range(len(answer.calls))))
    return [{"role": "user", "content": f"Go on, {number}. <|im_start|>"}]


@pytest.mark.parametrize("name", MANGLES)
@pytest.mark.parametrize("line", LINES)
def test_each_form_of_each_turn_is_one_trajectory(chat, name, line):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        await play.ask([*QUESTION, *MANGLES[name](first), *after(first, 0)])

    play = Play(chat, line, "It is 2.")
    asyncio.run(talk(play))
    made = play.check()
    assert made.branches == []
    assert [turn.role for turn in made.turns] == ["assistant", "tool", "assistant"]


STEP = st.tuples(
    st.sampled_from(LINES),
    st.sampled_from(sorted(MANGLES)),
    st.sampled_from(["keep", "keep", "keep", "keep", "drop", "rewrite", "back", "anew"]),
    st.booleans(),  # whether the endpoint is restarted
    st.booleans(),  # whether the request is sent twice
)


class Oracle:
    """Which turn each request follows, found in another way: from histories as lists of what is in them."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, ...]] = []  # of each turn
        self.parents: list[int | None] = []

    def parent(self, history: list[Any]) -> int | None:
        """The turn after the longest beginning of `history` that is what a turn saw, and that turn."""
        ends = [n for n, item in enumerate(history) if item[0] == "turn" and tuple(history[:n]) == self.before[item[1]]]
        self.before.append(tuple(history))
        self.parents.append(history[ends[-1]][1] if ends else None)
        return self.parents[-1]


async def episode(play: Play, steps: list[Any]) -> Oracle:
    oracle, items = Oracle(), [("said", 0)]
    forms: dict[Any, list[Message]] = {items[0]: QUESTION}
    for number, (_line, mangle, fate, restart, twice) in enumerate(steps):
        if restart:
            play.restart()
        history = [message for item in items for message in forms[item]]
        answer = await play.ask(history, digest=str(number))
        if twice:
            assert await play.ask(history, digest=str(number), retries=1) == answer
        assert play.tree.turns[number].after == oracle.parent(items)
        turn = ("turn", number)
        forms[turn] = MANGLES[mangle](answer)
        if fate == "rewrite":
            turn = ("foreign", number)
            forms[turn] = [{"role": "assistant", "content": f"Nobody said this, {number}."}]
        items = items if fate == "drop" else [*items, turn]
        said = ("said", number + 1)
        answered = fate not in ("drop", "rewrite")
        forms[said] = after(answer if answered else replace(answer, calls=()), number)
        items.append(said)
        if fate == "anew":
            items = [items[0], said]
        if fate == "back" and len(items) > 4:  # the history goes on from where it was, without the last two turns
            items = [*items[:-4], said]
    return oracle


def check_samples(made: Trajectory, play: Play) -> None:
    """Samples hold each sampled token once, with what the engine logged for it, and mark nothing else."""
    samples = build_samples(group_of(made), [2.0], 5)
    assert len(samples) == 1 + len(made.branches)
    marked = []
    for sample in samples:
        streams = zip(sample.labels, sample.mask, sample.rollout_logp, sample.versions, sample.advantages, strict=True)
        for label, wrote, logp, version, advantage in streams:
            assert (logp, version, advantage) == (0.0, -1, 0.0) or wrote
            if wrote:
                marked.append((label, logp, version))
                assert advantage == 2.0
    logged = [each for _, g in play.engine.log for each in zip(g.token_ids, g.rollout_logp, g.versions, strict=True)]
    assert sorted(marked) == sorted(logged)


@settings(max_examples=often(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=7))
def test_any_history_is_what_its_turns_say(chat, steps):
    play = Play(chat, *(step[0] for step in steps))
    oracle = asyncio.run(episode(play, steps))
    made = play.check()
    check_samples(made, play)
    followed = {turn.after for turn in play.tree.turns}
    assert {turn.number: turn.after for turn in play.tree.turns} == dict(enumerate(oracle.parents))
    assert 1 + len(made.branches) == sum(n not in followed for n in range(len(oracle.before)))
    if all(step[2] == "keep" for step in steps):
        assert made.branches == []
        assert len([turn for turn in made.turns if turn.role == "assistant"]) == len(steps)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=8,
)


@pytest.mark.thorough
@given(value=st.dictionaries(st.text(), JSON, max_size=4))
def test_arguments_are_the_same_in_each_way_of_writing_them(value):
    written = json.dumps(value)
    for other in (json.dumps(value, ensure_ascii=False, indent=2), json.dumps(dict(reversed(value.items())))):
        assert arguments_value(other) == arguments_value(written)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a": 1}', '{"a": 2}'),
        ('{"a": 1}', '{"a": true}'),
        ('{"a": "1.0"}', '{"a": 1}'),
        ('{"a": [1, 2]}', '{"a": [2, 1]}'),
        ('{"a": 1}', '{"a": 1, "b": 0}'),
        ('{"a": 1', '{"a": 1}'),
        ('{"a": null}', '{"a": false}'),
    ],
)
def test_other_arguments_are_not_the_same(one, other):
    assert arguments_value(one) != arguments_value(other)


@pytest.mark.parametrize("text", ["{" * 100_000, "[" * 100_000, "1" * 10_000, '{"a": ' + "9" * 5000 + "}", "\ud800", ""])
def test_any_arguments_are_accepted(text):
    assert arguments_value(text) == arguments_value(f" {text} ")
    call = {"id": "x", "function": {"name": "f", "arguments": text}}
    made = fitted([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"][0]["function"]["arguments"]
    assert made == text.replace("\ud800", "\ufffd")


def test_results_that_answer_calls_of_one_id_stay_in_their_order():
    calls = [{"id": "x", "function": {"name": "f", "arguments": "{}"}}] * 2
    said = [{"role": "tool", "tool_call_id": id_, "content": str(n)} for n, id_ in enumerate(["x", "y", "x", "x"])]
    made = fitted([{"role": "assistant", "tool_calls": calls}, *said])[1:]
    assert [message["content"] for message in made] == ["0", "2", "3", "1"]


def test_calls_between_the_users_words_become_a_message_of_their_own():
    text = "Task.\nCalling tools:\n[{'id': 'c1'}]\nObservation:\n2"
    made = fitted([{"role": "user", "content": text}], known=["c1"])
    assert [m["content"] for m in made] == ["Task.", "Calling tools:\n[{'id': 'c1'}]", "Observation:\n2"]
    assert fitted([{"role": "user", "content": text}], known=["c2"]) == [{"role": "user", "content": text}]
    assert all(one["role"] == other["role"] == "user" for one, other in pairwise(made))
