"""The reward for a boxed answer, math-verify in its own process included."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.protocols import Outcome
from ctpo_megatron.rollout.rewards import math
from ctpo_megatron.rollout.rewards.math import MathReward, quick_verdict
from ctpo_megatron.types import Prompt


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} }", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{\boxed{6}}", "6"),
        ("5", None),
        (r"\boxed 5", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_balanced_box(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("answer", "given_", "verdict"),
    [
        ("204", "204", True),
        ("204", " 204.0 ", True),
        ("204", "205", False),
        ("204", "+204", True),
        ("1000000", "1,000,000", True),
        ("12", "1,2", None),
        ("0.5", ".50", True),
        ("0.5", "0.25", None),
        ("x+1", "x + 1", True),
        ("$x$", "x", True),
        ("1/2", "0.5", None),
        ("204", "", False),
        ("1e5", "100000", None),
    ],
)
def test_what_needs_no_mathematics(answer, given_, verdict):
    assert quick_verdict(answer, given_) is verdict


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_whole_numbers_are_decided_exactly(left, right):
    assert quick_verdict(str(left), f"{right:,}") is (left == right)
    assert quick_verdict(str(left), f"{left:,}") is True


def children() -> list[str]:
    """Command lines of this process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent, command = (entry / "stat").read_text().rpartition(")")[2].split()[1], (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(parent) == os.getpid():
                found.append(command.decode())
    return [command for command in found if "rollout.judge" in command]


@pytest.mark.thorough
def test_equal_in_mathematics_and_nothing_evaluated(tmp_path):
    """One process for all of it, since starting it takes a second or two."""

    async def scores() -> None:
        patient, hasty = (MathReward(MathRewardConfig(timeout_s=timeout_s), judges=1) for timeout_s in (20, 1))
        mark = tmp_path / "made"
        undecided: list[bool] = []

        async def score(answer: str, text: str, reward: MathReward = patient) -> float:
            found = await reward.score(Prompt(0, (), answer), Outcome(text))
            undecided.append(found.undecided)
            return found.reward

        assert await score("204", "no box: 204") == 0.0
        assert await score("204", r"\boxed{204}") == 1.0
        assert await score(r"\boxed{7}", r"so \boxed{7}") == 1.0
        assert children() == []  # none of these needed mathematics
        assert await score("2^{99}", r"\boxed{4^{99/2}}") == 1.0
        assert len(children()) == 1
        assert await score("1/2", r"\boxed{0.5}") == 1.0
        assert await score(r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}") == 1.0
        assert await score(r"\frac{1}{2}", r"\boxed{\frac{1}{3}}") == 0.0
        assert await score("x+1", r"\boxed{1+x}") == 1.0
        assert await score("x+1", r"\boxed{1-x}") == 0.0
        assert await score("x+1", rf"\boxed{{__import__('os').mkdir('{mark}')}}") == 0.0
        assert await score("x+1", r"\boxed{" + "x" * 2000 + "}") == 0.0
        assert not any(undecided)
        patient.close()
        # a number too large to exist: it is given up in time, counted, and the next answer is judged again
        assert await score("1/2", r"\boxed{0.5}", hasty) == 1.0
        begun = time.monotonic()
        assert await score("5", r"\boxed{9^{9^{9^{9}}}}", hasty) == 0.0
        assert time.monotonic() - begun < 5.0
        assert undecided[-1]
        assert children() == []
        assert await score("1/2", r"\boxed{0.5}", hasty) == 1.0
        assert undecided.count(True) == 1
        hasty.close()
        assert not mark.exists()
        assert children() == []

    asyncio.run(scores())


def test_closed_while_it_starts_nothing_is_left():
    async def cancel() -> None:
        reward = MathReward(MathRewardConfig(), judges=2)
        tasks = [asyncio.ensure_future(reward.score(Prompt(0, (), "1/2"), Outcome(r"\boxed{0.5}"))) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert len(children()) == 2
        for task in tasks:
            task.cancel()
        done, _ = await asyncio.wait(tasks, timeout=5)
        assert len(done) == 4
        reward.close()
        await asyncio.sleep(0)
        assert children() == []

    asyncio.run(cancel())


def test_a_judge_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(math, "JUDGE", ("/bin/sh", "-c", "exit 3"))
    with pytest.raises(RolloutError, match="did not start"):
        asyncio.run(MathReward(MathRewardConfig()).score(Prompt(0, (), "1/2"), Outcome(r"\boxed{0.5}")))
