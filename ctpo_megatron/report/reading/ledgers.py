"""ledger.jsonl as sums, and as what each step was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from ctpo_megatron.loop.tally import Tally
from ctpo_megatron.types import End

NORMAL_95 = 1.96  # standard errors to either side of a mean


@dataclass(frozen=True, slots=True)
class Band:
    """A mean with its 95 % interval. `count`: the independent values that it is of."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Groups:
    """What became of a run's groups; `rewards`: of each step, the mean rewards of the groups that it was trained on."""

    tally: Tally = field(default_factory=Tally)
    rewards: Mapping[int, list[float]] = field(default_factory=dict)
    damaged: int = 0  # lines that are no lines of a ledger

    def band(self, step: int) -> Band | None:
        """Returns the mean reward of a step over its groups; attempts of one group share a prompt and are not independent.

        None with fewer than two groups.
        """
        return band(self.rewards.get(step, []))


def band(values: list[float]) -> Band | None:
    """Returns the mean of independent values with its normal 95 % interval; None of fewer than two."""
    if len(values) < 2:
        return None
    mean, error = fmean(values), stdev(values) / sqrt(len(values))
    return Band(mean, mean - NORMAL_95 * error, mean + NORMAL_95 * error, len(values))


def read_groups(lines: Iterable[Mapping[str, Any]]) -> Groups:
    """Returns what lines of a ledger tell. Where the run went back to a step, earlier lines of later steps count no more."""
    tallies: dict[int, Tally] = {}
    rewards: dict[int, list[float]] = {}
    damaged = 0
    for line in lines:
        back, step = line.get("back"), line.get("step")
        if isinstance(back, int):
            for later in [each for each in tallies if each > back]:
                del tallies[later]
                rewards.pop(later, None)
            continue
        one = Tally()
        try:
            one.add(line)
            reward = line["reward"]
        except (KeyError, TypeError, ValueError):
            damaged += 1
            continue
        if not isinstance(step, int):
            damaged += 1
            continue
        tallies.setdefault(step, Tally()).update(one)
        if line["end"] == End.TRAINED and isinstance(reward, int | float):
            rewards.setdefault(step, []).append(float(reward))
    whole = Tally()
    for each in tallies.values():
        whole.update(each)
    return Groups(whole, rewards, damaged)
