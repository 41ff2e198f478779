"""Sums of a ledger: how many groups ended how, how long and how hard they were, so that a bias is a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ctpo_megatron.loop.admission import Admitted
from ctpo_megatron.types import End, FailedAttempt, Trajectory, TrajectoryGroup

SHORTEST = 64  # tokens: the first bin of lengths ends here, each further one at twice as many
REWARDS = (0.25, 0.5, 0.75)  # borders of difficulty between never right and always right
UNKNOWN = "unknown"  # length or difficulty of a group of which nothing is known


class Tally(Counter[tuple[str, ...]]):
    """Counts by (what, how the group ended, ...), as lines of a ledger say it. Tallies add up.

    groups, attempts, tokens, rewards: of groups that ended so; judged: attempts with a reward; status: attempts by their status;
    length and difficulty: groups by the bin that they are in.
    """

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a line of a ledger (`group_line`)."""
        end = str(line["end"])
        attempts = line["attempts"]
        judged = [each["reward"] for each in attempts if each["reward"] is not None]
        self["groups", end] += 1
        self["attempts", end] += len(attempts)
        self["judged", end] += len(judged)
        self["tokens", end] += sum(each["tokens"] for each in attempts)
        self["rewards", end] += sum(judged)
        for each in attempts:
            self["status", end, each["status"]] += 1
        self["length", end, length_bin(line.get("tokens"))] += 1
        self["difficulty", end, difficulty_bin(line.get("reward"))] += 1

    @property
    def groups(self) -> int:
        """Returns how many groups have ended."""
        return sum(self["groups", end] for end in End)

    def bias(self) -> dict[str, float]:
        """Returns how attempts that were trained on differ from all that ended, over the whole run, under the record's names."""
        kept, ended = (End.TRAINED,), tuple(End)
        return {
            "ledger/kept_length": self._mean("tokens", "attempts", kept, 1.0)
            / (self._mean("tokens", "attempts", ended, 1.0) or 1.0),
            "ledger/kept_reward": self._mean("rewards", "judged", kept, 0.0) - self._mean("rewards", "judged", ended, 0.0),
        }

    def summary(self) -> dict[str, Any]:
        """Returns the sums as JSON values: groups and attempts by their ends, and two tables, bin to end to groups."""
        return {
            "groups": {str(end): self["groups", end] for end in End},
            "attempts": {str(end): {key[2]: count for key, count in self._of("status", end)} for end in End},
            **self.bias(),
            "by_length": self._table("length", lambda name: (name == UNKNOWN, int(name) if name.isdigit() else 0)),
            "by_difficulty": self._table("difficulty", lambda name: (name == UNKNOWN, name)),
        }

    def _mean(self, what: str, of: str, ends: tuple[End, ...], default: float) -> float:
        count = sum(self[of, end] for end in ends)
        return sum(self[what, end] for end in ends) / count if count else default

    def _of(self, what: str, end: End) -> list[tuple[tuple[str, ...], int]]:
        return sorted((key, count) for key, count in self.items() if key[:2] == (what, end) and count)

    def _table(self, what: str, order: Any) -> dict[str, dict[str, int]]:
        names = sorted({key[2] for key in self if key[0] == what}, key=order)
        return {name: {str(end): self[what, end, name] for end in End} for name in names}


def group_line(group: Admitted, step: int, end: End, reason: str, made: TrajectoryGroup | None) -> dict[str, Any]:
    """Returns the line of a group that ended; `made`: what it holds, None where it was not finished."""
    attempts = [] if made is None else [*map(_finished, made.trajectories), *map(_failed, made.failed)]
    rewards = [each["reward"] for each in attempts if each["reward"] is not None]
    return {
        "step": step,
        "group": str(group.id),
        "prompt": group.prompt.key,
        "version": group.version,
        "end": end,
        "reason": reason,
        "reward": fmean(rewards) if rewards else None,
        "tokens": fmean(each["tokens"] for each in attempts) if attempts else None,
        "attempts": attempts,
    }


def _finished(attempt: Trajectory) -> dict[str, Any]:
    versions = [version for turn in attempt.all_turns if turn.role == "assistant" for version in turn.versions]
    known = {"attempt": attempt.id.number, "status": attempt.status, "reward": attempt.reward, "tokens": attempt.response_length}
    return known | {"versions": [min(versions, default=None), max(versions, default=None)]}


def _failed(attempt: FailedAttempt) -> dict[str, Any]:
    status = "aborted" if attempt.aborted else "failed"
    known = {"attempt": attempt.id.number, "status": status, "reward": attempt.reward, "tokens": attempt.response_length}
    return known | {"reason": attempt.reason}


def length_bin(tokens: float | None) -> str:
    """Returns the largest length of the bin that `tokens` are in: 64, 128, 256, ..."""
    if tokens is None:
        return UNKNOWN
    end = SHORTEST
    while tokens > end:
        end *= 2
    return str(end)


def difficulty_bin(reward: float | None) -> str:
    """Returns the bin of a group's mean reward, where 0 is never right and 1 always."""
    if reward is None:
        return UNKNOWN
    if reward <= 0 or reward >= 1:
        return "0" if reward <= 0 else "1"
    borders = (0.0, *REWARDS, 1.0)
    place = sum(reward >= border for border in REWARDS)
    return f"{borders[place]:g} to {borders[place + 1]:g}"
