"""Which turns of a conversation are taught, and the order of demonstrations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.config.rollout import DataConfig
from ctpo_megatron.data.demonstrations import Demonstrations
from ctpo_megatron.data.sft import read_demonstrations
from ctpo_megatron.errors import DataError
from ctpo_megatron.types import TrainSample
from tests.unit.data.test_samples import Letters, shown, write


class Forgetful(Letters):
    """A template that leaves what is in brackets out of turns before the last user message, as those of reasoning models do."""

    def demonstration(self, messages: Any, start: int) -> Any:
        last = max(place for place, message in enumerate(messages) if message["role"] == "user")
        kept = [
            message if place > last else message | {"content": message["content"].rpartition("]")[2]}
            for place, message in enumerate(messages)
        ]
        return super().demonstration(kept, start)


def taught(tmp_path: Path, talk: str, chat: Any = None, turns: Any = "all") -> list[str]:
    return [shown(each) for each in read_demonstrations(write(tmp_path / "s.jsonl", talk), chat or Letters(), turns=turns)]


def test_all_answers_of_a_conversation_are_one_sample_with_exact_masks(tmp_path: Path) -> None:
    talk = "system: s, user: q, assistant: code, tool: 12, assistant: end, user: r, user: t, assistant: b"
    assert taught(tmp_path, talk) == ["(<s|u<q|a<)code|(t<12|a<)end|(u<r|u<t|a<)b|"]
    assert taught(tmp_path, talk, turns="last") == ["(<s|u<q|a<code|t<12|a<end|u<r|u<t|a<)b|"]


def test_answers_that_the_template_writes_otherwise_later_are_samples_of_their_own(tmp_path: Path) -> None:
    """Each with its reasoning, behind a prompt without the reasoning of those before: as the model would have been asked."""
    talk = "user: q, assistant: [x]a, user: r, assistant: [y]b, user: t, assistant: c"
    assert taught(tmp_path, talk, Forgetful()) == [
        "(<q|a<)[x]a|",
        "(<q|a<a|u<r|a<)[y]b|",
        "(<q|a<a|u<r|a<b|u<t|a<)c|",
    ]
    without = "user: q, assistant: a, user: r, assistant: [y]b, user: t, assistant: c"
    assert taught(tmp_path, without, Forgetful()) == ["(<q|a<)a|(u<r|a<)[y]b|", "(<q|a<a|u<r|a<b|u<t|a<)c|"]


def test_a_greeting_answers_nothing_and_a_broken_answer_is_named(tmp_path: Path) -> None:
    assert taught(tmp_path, "assistant: hi, user: q, assistant: a, user: r, assistant: b") == ["(<hi|u<q|a<)a|(u<r|a<)b|"]
    with pytest.raises(DataError, match="after message 0 come assistant, tool; needed: assistant"):
        taught(tmp_path, "user: q, assistant: a, tool: t, user: r, assistant: b")


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=7))
def test_every_answer_is_taught_once_or_the_row_is_refused(tmp_path_factory: pytest.TempPathFactory, roles: list[str]) -> None:
    """Against a slow reading of the roles, letter by letter."""
    talk = ["user", *roles]
    names = [f"{role}: {chr(ord('A') + place)}" for place, role in enumerate(talk)]
    path = write(tmp_path_factory.getbasetemp() / "roles.jsonl", ", ".join(names))
    wanted, fine, before = [], talk[-1] == "assistant", ""
    for place, role in enumerate(talk):
        fine = fine and not (role == "tool" and before != "assistant") and not (role == before == "assistant")
        fine = fine and not (role == "user" and before == "tool")
        wanted += [chr(ord("A") + place) + "|"] if role == "assistant" else []
        before = role
    if not fine:
        with pytest.raises(DataError):
            read_demonstrations(path, Letters(), turns="all")
        return
    (sample,) = read_demonstrations(path, Letters(), turns="all")
    said = "".join(chr(label) if wrote else " " for label, wrote in zip(sample.labels, sample.mask, strict=True))
    assert said.split() == wanted


def sample(number: int) -> TrainSample:
    return TrainSample([number], [number], [True], [0.0], [-1], [1.0])


def data(**more: Any) -> DataConfig:
    return DataConfig(train="x.jsonl", **more)


def drawn(stream: Demonstrations, count: int) -> list[int]:
    return [each.labels[0] for each in stream.next(count)]


def test_sources_come_by_their_weights_each_in_epochs_of_its_own() -> None:
    mixture = data(mixture=[{"name": "more", "path": "y.jsonl", "weight": 3.0}])
    sources = {"": [sample(n) for n in range(50)], "more": [sample(n) for n in range(100, 110)]}
    stream = Demonstrations(sources, mixture, 1)
    found = drawn(stream, 400)
    share = sum(n >= 100 for n in found) / 400
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    for source in sources.values():
        own = [n for n in found if n in {each.labels[0] for each in source}]
        epochs = [own[first : first + len(source)] for first in range(0, len(own) // len(source) * len(source), len(source))]
        assert epochs
        assert all(Counter(epoch) == Counter(each.labels[0] for each in source) for epoch in epochs)
    again = Demonstrations(sources, mixture, 1)
    assert drawn(again, 123) == found[:123]
    assert drawn(Demonstrations(sources, mixture, 1, again.state()), 277) == found[123:]


@pytest.mark.parametrize("change", ["content", "mask", "order", "sources"])
def test_other_demonstrations_are_not_gone_on_with(change: str) -> None:
    before = {"": [sample(n) for n in range(4)]}
    state = Demonstrations(before, data(), 1).state()
    changed = [sample(n) for n in range(4)]
    if change == "content":
        changed[2] = sample(9)
    elif change == "mask":
        changed[2] = TrainSample([2], [2], [False], [0.0], [-1], [0.0])
    elif change == "order":
        changed.reverse()
    mixture = [{"name": "more", "path": "y.jsonl"}] if change == "sources" else []
    sources = {"": changed} | ({"more": [sample(7)]} if mixture else {})
    with pytest.raises(DataError):
        Demonstrations(sources, data(mixture=mixture), 1, state)
    drawn(Demonstrations(before, data(), 1, state), 4)


def test_pools_and_curricula_are_passed_over() -> None:
    """They look at rewards, of which there are none."""
    given = data(pools={"borders": [0.5], "weights": [1, 1, 1]}, curriculum="no.such:function")
    assert Counter(drawn(Demonstrations({"": [sample(n) for n in range(5)]}, given, 1), 5)) == dict.fromkeys(range(5), 1)
