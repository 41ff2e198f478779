"""Trajectories: turns, budgets, statuses and rewards, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.data.samples import build_samples
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score, ToolResult
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.types import Generation, Status, Trajectory
from tests.support.often import often
from tests.support.scripted import CALCULATOR, CALL, END, PROMPT, SAMPLING, WRONG, Boxes, Letters, Script, play
from tests.support.trajectories import ATTEMPT, GROUP


def test_a_reward_sees_how_an_attempt_went_and_what_it_says_is_kept():
    class Seeing:
        async def score(self, prompt, outcome):
            self.seen = outcome
            return Score(0.5, True, "given", "why", {"style": 0.25}, 0.75)

    reward = Seeing()
    environment = ToolEnvironment(Script([CALL, r"\boxed{56}"]), Letters(), CALCULATOR, reward)
    trajectory = asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, 5, 1000)))
    said = ("assistant", CALL), ("tool", "56"), ("assistant", r"\boxed{56}")
    assert reward.seen == Outcome(f"{CALL}\n\\boxed{{56}}", said, trajectory.response_length, 1, 0, Status.FINISHED)
    assert (trajectory.reward, trajectory.undecided, trajectory.given, trajectory.why) == (0.5, True, "given", "why")
    assert (trajectory.terms, trajectory.accuracy, trajectory.rightness) == ({"style": 0.25}, 0.75, 0.75)


def test_a_tool_call_and_an_answer():
    trajectory, script = play(CALL, r"\boxed{56}")
    assert trajectory.status is Status.FINISHED
    assert trajectory.reward == 1.0
    assert (trajectory.tool_calls, trajectory.tool_errors) == (1, 0)
    assert [t.role for t in trajectory.turns] == ["assistant", "tool", "assistant"]
    assert trajectory.text == f"{CALL}|{{56}}\\boxed{{56}}|"
    assert script.seen[1] == (f"question{CALL}|{{56}}", 1000 - len(f"{CALL}|{{56}}"), 9)
    assert trajectory.turns[0].versions[0] == 1
    assert trajectory.turns[2].versions[0] == 2
    assert set(trajectory.turns[1].rollout_logp) == {0.0}
    assert set(trajectory.turns[1].versions) == {-1}
    (sample,) = build_samples(asyncio.run(group_of(trajectory)), [1.0], 0)
    assert "".join(map(chr, [sample.input_ids[0], *sample.labels])) == "question" + trajectory.text
    assert "".join(chr(i) for i, w in zip(sample.labels, sample.mask, strict=True) if w) == f"{CALL}|\\boxed{{56}}|"


async def group_of(trajectory: Trajectory):
    class Same:
        def begin(self, prompt, attempt):
            return Attempt(attempt, prompt.index, [])

        async def run(self, attempt, prompt, session, sampling, note):
            return trajectory

    return await Rollouter(Same(), RolloutConfig()).group(PROMPT, GROUP, size=1, sampling=SAMPLING)


def test_an_error_of_the_program_is_told_and_counted():
    trajectory, _ = play(WRONG, r"\boxed{56}")
    assert (trajectory.tool_calls, trajectory.tool_errors, trajectory.reward) == (1, 1, 1.0)
    assert "ZeroDivisionError: division by zero" in trajectory.text


def test_what_a_program_prints_is_no_answer():
    """Only what the model wrote itself is judged."""

    class Boxing:
        async def run(self, code):
            return ToolResult("\\boxed{56}", True, 0.0)

    trajectory, _ = play(CALL, "done", tool=Boxing())
    assert "{\\boxed{56}}" in trajectory.text
    assert trajectory.reward == 0.0


@pytest.mark.parametrize(
    ("lines", "options", "status", "roles"),
    [
        (["no idea"], {}, Status.FINISHED, "a"),
        ([CALL, CALL, CALL], {"turns": 3}, Status.MAX_TURNS, "atata"),
        ([CALL], {"turns": 1}, Status.MAX_TURNS, "a"),
        ([CALL], {"tool": None}, Status.FINISHED, "a"),
        ([CALL], {"budget": len(CALL)}, Status.LENGTH, "a"),
        ([CALL], {"budget": len(CALL) + 1}, Status.LENGTH, "a"),
        ([CALL], {"budget": len(CALL) + 1 + len("{56}")}, Status.LENGTH, "a"),  # the tool's turn fits, an answer does not
        ([CALL, "ab"], {"budget": len(CALL) + 1 + len("{56}") + 1}, Status.LENGTH, "ata"),
        ([CALL, "ab"], {"budget": len(CALL) + 1 + len("{56}") + 3}, Status.FINISHED, "ata"),
        ([CALL + r"\boxed{56}"], {}, Status.FINISHED, "a"),
    ],
)
def test_how_it_ends(lines, options, status, roles):
    trajectory, script = play(*lines, **options)
    assert trajectory.status is status
    assert "".join(t.role[0] for t in trajectory.turns) == roles
    assert len(script.seen) == len(lines)


@settings(max_examples=often(80), deadline=None)
@given(
    lines=st.lists(st.sampled_from([CALL, WRONG, r"\boxed{56}", "hm", ""]), min_size=6, max_size=6),
    budget=st.integers(1, 150),
    turns=st.integers(1, 5),
)
def test_budgets_hold(lines, budget, turns):
    trajectory, script = play(*lines, budget=budget, turns=turns)
    assert 1 <= trajectory.response_length <= budget
    assert 1 <= len(script.seen) <= turns
    assert trajectory.turns[-1].role == "assistant"
    assert trajectory.sampled_length == sum(len(t.token_ids) for t in trajectory.turns if t.role == "assistant")
    for before, after in pairwise(trajectory.turns):
        assert before.role != after.role
        assert before.role == "tool" or before.token_ids[-1] == END


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Generation([], [], [], "stop"), "0 tokens; it was asked for 1 to 10"),
        (Generation([1] * 11, [0.0] * 11, [1] * 11, "length"), "11 tokens"),
        (Generation([65], [0.0], [1], "abort"), "'abort'; known: stop, length"),
        (Generation([65], [0.0], [1], "stop"), r"after token 65; stop tokens are \[124\]"),
    ],
)
def test_an_engine_that_breaks_its_promise_is_an_error(answer, words):
    class Engine:
        async def generate(self, input_ids, done, **_):
            return answer

    environment = ToolEnvironment(Engine(), Letters(), None, Boxes())
    with pytest.raises(RolloutError, match=words):
        asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 0, Sampling(1.0, 1, 10)))
