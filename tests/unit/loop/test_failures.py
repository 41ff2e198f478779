"""How many attempts may fail."""

from __future__ import annotations

import pytest

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.loop.failures import FailureShare, UndecidedShare
from ctpo_megatron.types import AttemptId, FailedAttempt, GroupId, Prompt, Status, Trajectory, TrajectoryGroup

PROMPT = Prompt(0, ({"role": "user", "content": "x"},), "1")


def ended(good: int = 0, *reasons: str, aborted: int = 0) -> TrajectoryGroup:
    name = GroupId(0)
    made = [Trajectory(0, [3], [], Status.FINISHED, id=AttemptId(name, n)) for n in range(good)]
    failed = [FailedAttempt(AttemptId(name, 9), reason) for reason in reasons]
    return TrajectoryGroup(PROMPT, made, id=name, failed=[*failed, *[FailedAttempt(AttemptId(name, 8), "other", True)] * aborted])


def test_a_share_of_the_last_attempts_may_fail() -> None:
    share = FailureShare(0.2, 10)
    share.add(ended(3, "port 31001 is closed", aborted=4))
    share.add(ended(3, "the sandbox is gone"))
    share.add(ended(9))  # the first of them is no longer among the last ten
    share.add(ended(0, "port 31007 is closed"))
    with pytest.raises(RolloutError) as raised:
        share.add(ended(0, "port 31009 is closed", "the sandbox is gone"))
    words = "3 of the last 10 attempts failed, each after rollout.retries; allowed: rollout.failed_share = 0.2 of 10"
    assert words in str(raised.value)
    assert str(raised.value).endswith("The most frequent reason, 2 times: port 31009 is closed")


def test_those_that_others_ended_do_not_count_and_none_may_be_allowed() -> None:
    share = FailureShare(0.0, 4)
    share.add(ended(4, aborted=4))
    with pytest.raises(RolloutError, match=r"1 of the last 4 attempts failed.* 1 times: x"):
        share.add(ended(0, "x"))


def judged(*reasons: str | None) -> TrajectoryGroup:
    name = GroupId(0)
    attempts = [(AttemptId(name, number), why) for number, why in enumerate(reasons)]
    made = [Trajectory(0, [3], [], Status.FINISHED, id=each, undecided=why is not None, why=why or "") for each, why in attempts]
    return TrajectoryGroup(PROMPT, made, id=name)


def test_a_share_of_the_last_attempts_may_be_undecided() -> None:
    share = UndecidedShare(0.2, 10)
    share.add(judged(None, "it raised ValueError: 7", None, None))
    share.add(ended(0, "the sandbox is gone"))  # which the reward has not seen
    share.add(judged("no end within 5 s"))
    with pytest.raises(RolloutError) as raised:
        share.add(judged(None, "it raised ValueError: 8"))
    words = "the reward came to no verdict on 3 of the last 7 attempts; allowed: rollout.undecided_share = 0.2 of 10. The most"
    assert words in str(raised.value)
    assert str(raised.value).endswith("The most frequent reason, 2 times: it raised ValueError: 8")
    never = UndecidedShare(1.0, 3)
    never.add(judged(*["x"] * 9))
