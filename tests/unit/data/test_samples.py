"""Trajectories and demonstrations as label-aligned samples."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.data.samples import build_samples
from ctpo_megatron.data.sft import read_demonstrations
from ctpo_megatron.errors import DataError
from ctpo_megatron.types import Prompt, Status, Trajectory, TrajectoryGroup, Turn
from tests.support.trajectories import ATTEMPT, GROUP, branched, group_of, trajectory

PROMPT = Prompt(0, ({"role": "user", "content": "q"},), "1")


def test_the_example_of_the_docstring():
    turns = [
        Turn("assistant", [5, 6], [-0.1, -0.2], [3, 4]),
        Turn("tool", [9], [0.0], [-1]),
        Turn("assistant", [4], [-0.3], [5]),
    ]
    group = TrajectoryGroup(PROMPT, [Trajectory(0, [7, 8], turns, Status.FINISHED, id=ATTEMPT)], id=GROUP)
    (sample,) = build_samples(group, [2.0], 11)
    assert sample.input_ids == [7, 8, 5, 6, 9]
    assert sample.labels == [8, 5, 6, 9, 4]
    assert sample.mask == [False, True, True, False, True]
    assert sample.rollout_logp == [0.0, -0.1, -0.2, 0.0, -0.3]
    assert sample.versions == [-1, 3, 4, -1, 5]
    assert sample.advantages == [0.0, 2.0, 2.0, 0.0, 2.0]
    assert sample.group == 11


def test_what_a_teacher_said_is_at_the_labels_that_it_said_it_of():
    turns = [
        Turn("assistant", [5, 6], [-0.1, -0.2], [3, 4], teacher_logp=[-0.5, -0.6]),
        Turn("tool", [9], [0.0], [-1]),
        Turn("assistant", [4], [-0.3], [5], teacher_logp=[-0.4]),
    ]
    group = TrajectoryGroup(PROMPT, [Trajectory(0, [7, 8], turns, Status.FINISHED, id=ATTEMPT)], id=GROUP)
    (sample,) = build_samples(group, [2.0], 11, teacher=3)
    assert (sample.teacher, sample.teacher_logp) == (3, [0.0, -0.5, -0.6, 0.0, -0.4])
    (sample,) = build_samples(TrajectoryGroup(PROMPT, [trajectory(1.0, [5])], id=GROUP), [2.0], 11)
    assert (sample.teacher, sample.teacher_logp) == (None, None)
    with pytest.raises(ValueError, match="differ in length"):
        Turn("assistant", [5, 6], [-0.1, -0.2], [3, 4], teacher_logp=[-0.5])


def turns_of(lengths: list[int]) -> list[Turn]:
    """Assistant and tool by turns, every token, log-prob and version distinct."""
    turns, token = [], 100
    for number, length in enumerate(lengths):
        ids = list(range(token, token + length))
        token += length
        wrote = number % 2 == 0
        logprobs = [-float(i) if wrote else 0.0 for i in ids]
        turns.append(Turn("assistant" if wrote else "tool", ids, logprobs, [i if wrote else -1 for i in ids]))
    return turns


@given(prompt=st.integers(1, 8), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_each_written_token_is_a_label_with_its_own_streams(prompt, lengths):
    turns = turns_of(lengths)
    trajectory = Trajectory(0, list(range(1, prompt + 1)), turns, Status.FINISHED, id=ATTEMPT)
    (sample,) = build_samples(TrajectoryGroup(PROMPT, [trajectory], id=GROUP), [-1.5], 0)
    assert len(sample) == prompt + sum(lengths) - 1
    assert sample.input_ids[1:] == sample.labels[:-1]
    written = [
        (label, logprob, version, advantage)
        for label, masked_in, logprob, version, advantage in zip(
            sample.labels, sample.mask, sample.rollout_logp, sample.versions, sample.advantages, strict=True
        )
        if masked_in
    ]
    assert written == [(i, -float(i), i, -1.5) for turn in turns if turn.role == "assistant" for i in turn.token_ids]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_each_written_token_gets_its_own_advantage_and_others_none(lengths):
    turns = turns_of(lengths)
    own = [float(i) for turn in turns if turn.role == "assistant" for i in turn.token_ids]
    (sample,) = build_samples(
        TrajectoryGroup(PROMPT, [Trajectory(0, [1], turns, Status.FINISHED, id=ATTEMPT)], id=GROUP), [own], 0
    )
    masked_in = zip(sample.labels, sample.mask, strict=True)
    assert sample.advantages == [float(label) if wrote else 0.0 for label, wrote in masked_in]
    for wrong in (own[1:], [*own, 1.0]):
        with pytest.raises(ValueError, match=f"{len(wrong)} advantages for {len(own)} tokens"):
            build_samples(TrajectoryGroup(PROMPT, [Trajectory(0, [1], turns, Status.FINISHED, id=ATTEMPT)], id=GROUP), [wrong], 0)


def test_one_advantage_per_trajectory():
    group = TrajectoryGroup(PROMPT, [Trajectory(0, [1], turns_of([2]), Status.FINISHED, id=ATTEMPT)] * 2, id=GROUP)
    assert [max(s.advantages, key=abs) for s in build_samples(group, [1.0, -2.0], 0)] == [1.0, -2.0]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        build_samples(group, [1.0], 0)
    with pytest.raises(ValueError, match="at least one prompt token"):
        build_samples(
            TrajectoryGroup(PROMPT, [Trajectory(0, [], turns_of([2]), Status.FINISHED, id=ATTEMPT)], id=GROUP), [1.0], 0
        )


class Letters:
    """A chat format one can read: a letter is its code, <, > and | frame turns."""

    def demonstration(self, messages, start):
        prompt = "".join(f"{m['role'][0]}<{m['content']}|" for m in messages[:start]) + "a<"
        frames = {"assistant": "{}|", "tool": "t<{}|a<"}
        parts = [(m["role"], frames[m["role"]].format(m["content"])) for m in messages[start:]]
        return [ord(c) for c in prompt], [(role, [ord(c) for c in text]) for role, text in parts]


def write(path, *conversations: str):
    """Conversations like `user: q, assistant: a`."""
    with path.open("w") as file:
        for talk in conversations:
            messages = [dict(zip(("role", "content"), part.split(": "), strict=True)) for part in talk.split(", ")]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def shown(sample) -> str:
    """Labels as text, those masked out in round brackets."""
    pairs = zip(map(chr, sample.labels), sample.mask, strict=True)
    return "".join(letter if wrote else f"({letter})" for letter, wrote in pairs).replace(")(", "")


def test_assistant_turns_are_masked_in_with_their_end(tmp_path):
    path = write(tmp_path / "s.jsonl", "user: q, assistant: code, tool: 12, assistant: end", "system: s, user: q, assistant: x")
    one, two = read_demonstrations(path, Letters())
    assert shown(one) == "(<q|a<)code|(t<12|a<)end|"
    assert shown(two) == "(<s|u<q|a<)x|"
    assert chr(one.input_ids[0]) == "u"
    assert one.advantages == [float(wrote) for wrote in one.mask]
    assert one.group != two.group


def test_earlier_turns_belong_to_the_prompt_and_a_system_prompt_is_added(tmp_path):
    path = write(tmp_path / "s.jsonl", "user: q, assistant: a, user: r, assistant: b")
    (sample,) = read_demonstrations(path, Letters(), system_prompt="s")
    assert shown(sample) == "(<s|u<q|a<a|u<r|a<)b|"


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ("system: s, assistant: a", "no user message; found roles: system, assistant"),
        ("user: q", "come no messages; needed: assistant"),
        ("user: q, tool: t, assistant: a", "come tool, assistant; needed"),
        ("user: q, assistant: a, tool: t", "come assistant, tool; needed"),
        ("user: q, assistant: a, assistant: b", "come assistant, assistant; needed"),
        ("user: q, robot: a", "role 'robot'; allowed: system, user, assistant, tool"),
    ],
)
def test_a_wrong_demonstration_is_named(tmp_path, talk, words):
    path = write(tmp_path / "s.jsonl", "user: q, assistant: a", talk)
    with pytest.raises(DataError, match=words) as caught:
        read_demonstrations(path, Letters())
    assert f"{path} line 2" in str(caught.value)


def test_branches_are_samples_of_their_attempt():
    made = branched(1.0, ([7, 1, 2, 9], [[5], [8], [6, 3]]), ([4], [[3]]))
    samples = build_samples(group_of(trajectory(0.0, [1]), made), [[0.5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], 11)
    assert [(s.attempt, s.group) for s in samples] == [(None, 11), (1, 11), (1, 11), (1, 11)]
    assert [s.advantages for s in samples] == [[0.5], [0.1, 0.2], [0.0, 0.0, 0.0, 0.3, 0.0, 0.4, 0.5], [0.6]]
    assert samples[2].input_ids == [7, 1, 2, 9, 5, 8, 6]
    assert samples[2].mask == [False, False, False, True, False, True, True]
    assert [s.advantages for s in build_samples(group_of(made), [2.0], 0)][2] == [2.0]
    with pytest.raises(ValueError, match="5 advantages for 6 tokens"):
        build_samples(group_of(made), [[1.0] * 5], 0)
