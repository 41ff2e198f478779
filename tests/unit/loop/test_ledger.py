"""The account of groups: on the disk, over stops, and as sums that show a bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.errors import StorageError
from ctpo_megatron.loop.admission import Admitted, Position
from ctpo_megatron.loop.buffer import EndedGroup, MadeStep
from ctpo_megatron.loop.ledger import GONE, LEFT, Ledger, read_tally
from ctpo_megatron.loop.tally import difficulty_bin, length_bin
from ctpo_megatron.types import AttemptId, End, FailedAttempt, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn


def admitted(number: int, version: int = 0) -> Admitted:
    return Admitted(GroupId(number), Prompt(number, ({"role": "user", "content": "x"},), "1"), version)


def group(number: int, tokens: int = 10, rewards: tuple[float, ...] = (0.0, 1.0)) -> TrajectoryGroup:
    turns = [Turn("assistant", [1] * tokens, [-1.0] * tokens, [3] + [4] * (tokens - 1))]
    name = GroupId(number)
    made = [Trajectory(number, [3], turns, Status.FINISHED, reward=r, id=AttemptId(name, n)) for n, r in enumerate(rewards)]
    return TrajectoryGroup(admitted(number).prompt, made, id=name)


def ended(number: int, end: End, made: TrajectoryGroup | None = None) -> EndedGroup:
    return EndedGroup(number, end, "why", str(number), made)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_group_ends_once_and_what_is_open_is_known(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(4):
        ledger.admit(admitted(number, version=2))
    with pytest.raises(ValueError, match="g00000007 was admitted, but g00000004 is the next one"):
        ledger.admit(admitted(7))
    failed = FailedAttempt(AttemptId(GroupId(2), 1), "the sandbox is gone", response_length=5)
    sibling = FailedAttempt(AttemptId(GroupId(2), 0), "another one", True, 7, reward=1.0)
    broken = TrajectoryGroup(admitted(2).prompt, [], id=GroupId(2), failed=[sibling, failed])
    metrics = ledger.settle(5, MadeStep([group(1)], [ended(0, End.FILTERED, group(0)), ended(2, End.FAILED, broken)]))
    assert {name: metrics[f"ledger/{name}"] for name in End if name is not End.TRAINED} == {
        "filtered": 1,
        "failed": 1,
        "aborted": 0,
    }
    assert [each.id.number for each in ledger.open] == [3]
    assert ledger.unbalanced() == []
    with pytest.raises(ValueError, match="g00000001 ended, but it is not open"):
        ledger.settle(6, MadeStep([group(1)], []))
    trained, _, third = lines(tmp_path / "ledger.jsonl")
    attempt = {"attempt": 1, "status": "finished", "reward": 1.0, "tokens": 10, "versions": [3, 4]}
    assert trained == {
        **{"step": 5, "group": "g00000001", "prompt": "1", "version": 2, "end": "trained", "reason": "", "reward": 0.5},
        **{"tokens": 10.0, "attempts": [attempt | {"attempt": 0, "reward": 0.0}, attempt]},
    }
    assert (third["end"], third["reason"], third["reward"], third["tokens"]) == ("failed", "why", 1.0, 6.0)
    assert third["attempts"][1] == {
        "attempt": 1, "status": "failed", "reward": None, "tokens": 5, "reason": "the sandbox is gone"
    }  # fmt: skip
    ledger.end_all(6)
    assert (ledger.open, ledger.unbalanced()) == ((), [])
    assert lines(tmp_path / "ledger.jsonl")[-1]["reason"] == "the run is done"


def test_a_run_that_goes_back_counts_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(6):
        ledger.admit(admitted(number))
    ledger.settle(1, MadeStep([group(0)], []))
    open_then = Position(4, {}, ledger.open[:3])
    ledger.settle(2, MadeStep([group(1)], [ended(2, End.FILTERED, group(2))]))
    ledger.close()
    with path.open("a") as file:
        file.write('{"step": 3, "gro')  # it was killed in the middle of a line
    again = Ledger(path, step=1, position=open_then)
    assert again.unbalanced() == []
    assert [each.id.number for each in again.open] == [1, 2, 3]
    again.admit(admitted(4))
    again.settle(2, MadeStep([group(2)], [ended(1, End.FILTERED, group(1))]))
    again.close()
    assert again.unbalanced() == []
    tally, later = read_tally(path)
    assert (tally["groups", "trained"], tally["groups", "filtered"], later) == (2, 1, [])
    assert [line.get("back") for line in lines(path)] == [None, None, None, 1, None, None]
    before = path.read_bytes()
    assert Ledger(path, step=2, position=Position(5, {}, again.open)).unbalanced() == []
    assert path.read_bytes() == before, "nothing was to be taken back"
    assert Ledger(path, step=2, position=Position(4, {}, again.open)).unbalanced() != []


def test_groups_that_are_passed_over_or_cannot_go_on_are_aborted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(5):
        ledger.admit(admitted(number))
    ledger.settle(1, MadeStep([group(0)], []))
    at_first = Position(5, {}, ledger.open)
    ledger.settle(2, MadeStep([group(1), group(2)], []))
    behind_second = Position(5, {}, ledger.open)
    ledger.close()
    back = Ledger(path, step=1, position=behind_second, passed_over=True)
    assert back.unbalanced() == []
    assert [(line["group"], line["reason"]) for line in lines(path)[-2:]] == [("g00000001", LEFT), ("g00000002", LEFT)]
    back.close()
    killed = Ledger(path, step=1, position=at_first)  # before another checkpoint: the first one has them open
    assert killed.unbalanced() == []
    killed.close()
    others = Ledger(path, step=1, position=Position(5, {}), gone=(1, 2, 3, 4))
    assert others.unbalanced() == []
    assert [line["reason"] for line in lines(path)[-4:]] == [GONE] * 4


def test_a_run_that_is_done_and_then_gets_more_steps(tmp_path: Path) -> None:
    """What was open behind its last step had ended with it, and is open again: its end counts no more."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(3):
        ledger.admit(admitted(number))
    ledger.settle(1, MadeStep([group(0)], []))
    behind = Position(3, {}, ledger.open)
    ledger.end_all(1)
    ledger.close()
    assert read_tally(path)[0]["groups", "aborted"] == 2
    more = Ledger(path, step=1, position=behind)
    assert more.unbalanced() == []
    more.settle(2, MadeStep([group(1), group(2)], []))
    more.close()
    assert more.unbalanced() == []
    tally, _ = read_tally(path)
    assert (tally["groups", "trained"], tally["groups", "aborted"]) == (3, 0)


def test_groups_that_the_ledger_does_not_know_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, step=4, position=Position(8, {}))
    assert ledger.unbalanced() == [
        "8 groups that the checkpoint had admitted are not in the ledger: a release without one began the run, or lines are lost"
    ]
    assert ledger.summary()["unbalanced"] == ledger.unbalanced()


def test_a_line_that_is_being_written_is_left_out_and_one_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.admit(admitted(0))
    ledger.settle(1, MadeStep([group(0)], []))
    ledger.close()
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert read_tally(path)[0].groups == 1
    path.write_text(whole + whole[:40] + "\n")
    with pytest.raises(StorageError, match=r"ledger.jsonl line 2 is damaged: .*Take the line out"):
        read_tally(path)


def test_a_bias_is_a_number() -> None:
    """Long and hard groups are dropped here: what is trained on is shorter and easier than what was sampled."""
    ledger = Ledger()
    for number in range(4):
        ledger.admit(admitted(number))
    short, long = group(0, 60, rewards=(1.0, 0.5)), group(1, 180, rewards=(0.0, 0.0))
    metrics = ledger.settle(1, MadeStep([short], [ended(1, End.FILTERED, long), ended(2, End.ABORTED)]))
    assert metrics["ledger/kept_length"] == pytest.approx(60 / 120)
    assert metrics["ledger/kept_reward"] == pytest.approx(0.75 - 0.375)
    summary = ledger.summary()
    assert (summary["admitted"], summary["open"]) == (4, 1)
    assert summary["groups"] == {"trained": 1, "filtered": 1, "failed": 0, "aborted": 1}
    assert list(summary["by_length"]) == ["64", "256", "unknown"]
    assert summary["by_length"]["256"] == {"trained": 0, "filtered": 1, "failed": 0, "aborted": 0}
    assert summary["by_difficulty"]["0.75 to 1"]["trained"] == 1
    assert summary["by_difficulty"]["0"]["filtered"] == 1
    assert summary["attempts"]["filtered"] == {"finished": 2}
    json.dumps(summary)


def test_bins() -> None:
    assert [length_bin(tokens) for tokens in (None, 0, 64, 65, 128, 5000)] == ["unknown", "64", "64", "128", "128", "8192"]
    rewards = (None, -1.0, 0.0, 0.1, 0.25, 0.6, 0.75, 0.99, 1.0, 3.0)
    bins = ["unknown", "0", "0", "0 to 0.25", "0.25 to 0.5", "0.5 to 0.75", "0.75 to 1", "0.75 to 1", "1", "1"]
    assert [difficulty_bin(reward) for reward in rewards] == bins
