"""Detectors that look at a number since the run was last at its best.

A number that changes while answers get better is learning; the same change while they do not is what these tell of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ctpo_megatron.record.alarms.detectors import CALM, Deaf, Reading, reading
from ctpo_megatron.record.alarms.series import Best, Recent
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.events import SettingDiffers
from ctpo_megatron.record.story import Happened

REWARD, ENTROPY, LENGTH, HELD_OUT = "reward/mean", "train/entropy", "rollout/response_tokens", "eval/accuracy"
SMOOTH = 9  # values of a series that is there at every step
EVALUATIONS = 3  # of one that is there now and then
EVALUATED = ("data.eval", "eval")  # settings of what accuracies are measured on, and how
STILL_THE_SAME = ("eval.every", "eval.servers")  # when, and where
FORM = ("rollout/truncated", "rollout/unanswered", "tool/error_rate")  # shares of trajectories and calls that went wrong


class Progress:
    """How good the run is, by the metric `name`: its best so far, and whether the task is solved. Others share it.

    It has to see each row before those who ask it.
    """

    def __init__(self, name: str, solved: float) -> None:
        self._name, self._solved = name, solved
        self.best = Best(SMOOTH)

    def take(self, row: Row) -> None:
        """Take the next row."""
        self.best.better = False
        value = row.get(self._name, math.nan)
        if math.isfinite(value):
            self.best.add(value)

    def solved(self) -> bool:
        """Returns whether the task counts as solved."""
        return self.best.ready and self.best.now >= self._solved


class Anchor:
    """Whether a new best makes the present numbers those that later ones are compared with.

    It does, unless the last reading was beyond its limit (`beyond`): then a second has to come, as single bests come of noise.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bests = 0
        self.beyond = False

    def moves(self) -> bool:
        """Returns whether it does, for the present row; asked once a row."""
        if not self.beyond:
            self._bests = 0
        if not self._progress.best.better:
            return False
        self._bests += 1
        return not self.beyond or self._bests > 1

    def judged(self, reading: Reading) -> Reading:
        """Returns the row's reading, and keeps whether it is beyond its limit."""
        self.beyond = reading.over
        return reading


class SinceBest(Deaf):
    """The metric `name`, in the median of SMOOTH values: as it is by now, and as it was when the run was last at its best."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._recent = Recent(SMOOTH)
        self._at_best: float | None = None
        self._anchor = Anchor(progress)

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row with the metric, once there is a best."""
        value = row.get(self._name, math.nan)
        if not math.isfinite(value):
            return None
        self._recent.add(value)
        if not (self._recent.full and self._progress.best.ready):
            return None
        now = self._recent.median
        if self._anchor.moves() or self._at_best is None:
            self._at_best = now
        return self._anchor.judged(self._judged(now, self._at_best))

    def _judged(self, now: float, at_best: float) -> Reading:
        raise NotImplementedError


class Entropy(SinceBest):
    """Entropy since the best reward: fallen or risen without a better one, or nearly gone while the task is not solved."""

    def __init__(self, progress: Progress, share: float, collapsed: float, explosion: float | None) -> None:
        super().__init__(progress, ENTROPY)
        self._share, self._collapsed, self._explosion = share, collapsed, explosion
        self._most = 0.0

    def _judged(self, now: float, at_best: float) -> Reading:
        self._most, excused = max(self._most, now), self._progress.solved()
        low = max(self._share * at_best, self._collapsed * self._most)
        if self._explosion is not None and now > at_best:
            high = self._explosion * max(at_best, 0.1 * self._most)
            return reading(now, high, ENTROPY, 1.0, excused=excused)
        return reading(now, low, ENTROPY, -1.0, excused=excused)


class Length(SinceBest):
    """Tokens of responses since answers were at their best: much more of them, or much fewer."""

    def __init__(self, progress: Progress, factor: float) -> None:
        super().__init__(progress, LENGTH)
        self._factor = factor

    def _judged(self, now: float, at_best: float) -> Reading:
        if now >= at_best:
            return reading(now, self._factor * at_best, LENGTH, 1.0)
        return reading(now, at_best / self._factor, LENGTH, -1.0)


class Form(Deaf):
    """Shares of what goes wrong in the form of responses, since answers were at their best: the one that has risen most."""

    def __init__(self, progress: Progress, rise: float, names: Sequence[str] = FORM) -> None:
        self._progress, self._rise = progress, rise
        self._recent = {name: Recent(SMOOTH) for name in names}
        self._at_best: dict[str, float] = {}
        self._anchor = Anchor(progress)

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row with such shares, once there is a best."""
        there = [name for name in self._recent if math.isfinite(row.get(name, math.nan))]
        for name in there:
            self._recent[name].add(row[name])
        now = {name: self._recent[name].median for name in there if self._recent[name].full}
        if not now or not self._progress.best.ready:
            return None
        if self._anchor.moves():
            self._at_best = now
        rises = [(value - self._at_best.setdefault(name, value), name) for name, value in now.items()]
        rise, name = max(rises)
        limit = self._at_best[name] + self._rise
        found = Reading(now[name], limit, name, over=rise > self._rise, calm=rise < (1 - CALM) * self._rise)
        return self._anchor.judged(found)


class Plateau(Deaf):
    """Training steps since the reward was last better than before, while the task is not solved."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row with a reward. It is calm again once there is a new best."""
        best = self._progress.best
        if REWARD not in row or not best.ready:
            return None
        over = best.age >= self._steps and not self._progress.solved()
        calm = best.age < self._steps / 2 or self._progress.solved()
        return Reading(best.age, self._steps, "steps since the best reward/mean", over=over, calm=calm)


class Fall:
    """Accuracy of evaluations, against the best it has been: below it by `fall`, and by twice what makes another best."""

    def __init__(self, fall: float) -> None:
        self._fall, self._best = fall, Best(EVALUATIONS)

    def event(self, happened: Happened) -> None:
        """Forget the best where a run goes on with other evaluations."""
        key = str(happened.fields.get("key", ""))
        if happened.name == SettingDiffers.name and key.startswith(EVALUATED) and key not in STILL_THE_SAME:
            self._best = Best(EVALUATIONS)

    def row(self, row: Row) -> Reading | None:
        """Returns the judgement of a row with an evaluation, once there is a best."""
        value = row.get(HELD_OUT, math.nan)
        if not math.isfinite(value):
            return None
        best = self._best
        best.add(value)
        if best.value is None:
            return None
        allowed, fallen = max(self._fall, 2 * best.margin()), best.value - best.now
        over, calm = fallen > allowed, fallen < (1 - CALM) * allowed
        return Reading(best.now, best.value - allowed, HELD_OUT, over=over, calm=calm)
