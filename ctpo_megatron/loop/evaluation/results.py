"""What came out of an evaluation: by problem, by benchmark, and of all benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ctpo_megatron.config.evaluation import BenchmarkSettings
from ctpo_megatron.loop.evaluation.estimators import CONFIDENCE, RESAMPLES, bootstrap, ks, maj_at, pass_at
from ctpo_megatron.loop.evaluation.votes import Votes
from ctpo_megatron.types import Status, Trajectory, TrajectoryGroup

ACCURACY = "accuracy"


@dataclass(frozen=True, slots=True)
class Problem:
    """All attempts at one problem, and what they voted."""

    group: TrajectoryGroup
    votes: Votes

    @property
    def accuracy(self) -> float:
        """Returns what the answers are worth in the mean; the reward, where it is nothing more."""
        return _mean([each.rightness for each in self.group.trajectories])

    def estimates(self) -> dict[str, float]:
        """Returns accuracy, pass@k and maj@k of this problem, by their names in the record."""
        votes, wanted = self.votes, ks(len(self.votes.classes))
        found = {ACCURACY: self.accuracy}
        if wanted:
            found |= {f"pass_at_{k}": pass_at(k, len(votes.classes), votes.right) for k in wanted}
            majorities = maj_at(wanted, votes.right, votes.wrong, votes.silent)
            found |= {f"maj_at_{k}": value for k, value in zip(wanted, majorities, strict=True)}
        return found

    def as_json(self) -> dict[str, Any]:
        """Returns the problem, and of each attempt what it came to."""
        attempts = [_attempt(each, vote) for each, vote in zip(self.group.trajectories, self.votes.classes, strict=True)]
        prompt = self.group.prompt
        return {"index": prompt.index, "answer": prompt.answer, **self.estimates(), "attempts": attempts}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems, with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """What a policy did on one benchmark. `seed`: of the bootstrap. `estimates`: by their names in the record."""

    settings: BenchmarkSettings
    version: int  # of the policy: training steps before it
    problems: Sequence[Problem]
    seed: int
    estimates: dict[str, Estimate]

    @classmethod
    def of(cls, settings: BenchmarkSettings, version: int, problems: Sequence[Problem], seed: int) -> BenchmarkResult:
        """Returns the result of these problems, of which there is at least one. It takes a second where they are many."""
        rows = [each.estimates() for each in problems]
        outcomes = np.array([list(row.values()) for row in rows])
        low, high = bootstrap(outcomes, seed=seed)
        columns = zip(rows[0], outcomes.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
        return cls(settings, version, problems, seed, {name: Estimate(*numbers) for name, *numbers in columns})

    @property
    def accuracy(self) -> float:
        """Returns avg@n."""
        return self.estimates[ACCURACY].value

    @property
    def trajectories(self) -> list[Trajectory]:
        """Returns all attempts, problem by problem."""
        return [each for problem in self.problems for each in problem.group.trajectories]

    def metrics(self) -> dict[str, float]:
        """Returns the estimates and the ends of their intervals under the record's names."""
        found = {}
        for name, estimate in self.estimates.items():
            for suffix, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high)):
                found[f"eval/{name}{suffix}/{self.settings.name}"] = value
        return found

    def summary(self) -> dict[str, Any]:
        """Returns all but the single problems, as JSON values."""
        attempts = self.trajectories
        return {
            "benchmark": asdict(self.settings),
            "version": self.version,
            "problems": len(self.problems),
            "estimates": {name: asdict(each) for name, each in self.estimates.items()},
            "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": self.seed},
            "no_answer": _mean([each.given is None for each in attempts]),
            "cut_short": _mean([each.status is not Status.FINISHED for each in attempts]),
            "tool_rate": _mean([each.tool_calls > 0 for each in attempts]),
            "response_tokens": _mean([each.response_length for each in attempts]),
            "undecided": sum(each.undecided for each in attempts) + sum(each.votes.undecided for each in self.problems),
        }

    def as_json(self) -> dict[str, Any]:
        """Returns everything, problem by problem."""
        return self.summary() | {"by_problem": [each.as_json() for each in self.problems]}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one policy did on the benchmarks that were due. `whole`: these are all that the run has."""

    results: Sequence[BenchmarkResult]
    whole: bool
    seconds: float
    stood_still_s: float = 0.0  # how long training did, for it

    @property
    def accuracy(self) -> float:
        """Returns the mean over benchmarks of their avg@n."""
        return _mean([each.accuracy for each in self.results])

    @property
    def has_more_to_tell(self) -> bool:
        """Whether there is more than the accuracy: several benchmarks, or several attempts at a problem."""
        return len(self.results) > 1 or any(each.settings.samples > 1 for each in self.results)

    @property
    def groups(self) -> list[TrajectoryGroup]:
        """Returns all groups, benchmark by benchmark."""
        return [problem.group for each in self.results for problem in each.problems]

    @property
    def tool_rate(self) -> float:
        """Returns the share of all attempts that called a tool."""
        return _mean([each.tool_calls > 0 for each in self._attempts])

    @property
    def _attempts(self) -> list[Trajectory]:
        return [trajectory for each in self.results for trajectory in each.trajectories]

    def metrics(self) -> dict[str, float]:
        """Returns everything under the record's names."""
        found = {"eval/accuracy": self.accuracy} if self.whole else {}
        found |= {
            "eval/tool_rate": self.tool_rate,
            "eval/response_tokens": _mean([each.response_length for each in self._attempts]),
            "time/eval": self.seconds,
            "time/eval_stood_still": self.stood_still_s,
        }
        for each in self.results:
            found |= each.metrics()
        return found


def _attempt(trajectory: Trajectory, vote: int | None) -> dict[str, Any]:
    return {
        "id": str(trajectory.id),
        "reward": trajectory.reward,
        "given": trajectory.given,
        "vote": vote,
        "status": str(trajectory.status),
        "tokens": trajectory.response_length,
        "tool_calls": trajectory.tool_calls,
        "undecided": trajectory.undecided,
        "why": trajectory.why,
        "accuracy": trajectory.rightness,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
