"""How many attempts fail, or are undecided: a few are data, too many are the end of the run."""

from __future__ import annotations

import re
from collections import Counter, deque

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.types import TrajectoryGroup

SHOWN = 500  # characters of a reason


class FailureShare:
    """Watches the share of failed attempts among the last `window`.

    Others of their groups do not count: where each group has one that fails, the run makes no step, whatever the others do.
    """

    def __init__(self, share: float, window: int) -> None:
        self._share, self._window = share, window
        self._last: deque[str | None] = deque(maxlen=window)  # why it failed; None: it did not

    def add(self, group: TrajectoryGroup) -> None:
        """Count the attempts of a group. Raises RolloutError, with the most frequent reason, where too many have failed."""
        self._last.extend([None] * len(group.trajectories))
        reasons = [each.reason for each in group.failed if not each.aborted]
        if not reasons:
            return
        self._last.extend(reasons)
        failed = [reason for reason in self._last if reason is not None]
        if len(failed) > self._share * self._window:
            raise RolloutError(self._sentence(failed))

    def _sentence(self, failed: list[str]) -> str:
        return (
            f"{len(failed)} of the last {len(self._last)} attempts failed, each after rollout.retries; allowed: "
            f"rollout.failed_share = {self._share:g} of {self._window}. {_most_frequent(failed)}"
        )


class UndecidedShare:
    """Watches the share of undecided attempts among the last `window` that the reward has looked at."""

    def __init__(self, share: float, window: int) -> None:
        self._share, self._window = share, window
        self._last: deque[str | None] = deque(maxlen=window)  # why it is undecided; None: it is not

    def add(self, group: TrajectoryGroup) -> None:
        """Count the attempts of a group. Raises RolloutError, with the most frequent reason, where too many are undecided."""
        self._last.extend((each.why or "no verdict in time") if each.undecided else None for each in group.trajectories)
        undecided = [why for why in self._last if why is not None]
        if len(undecided) > self._share * self._window:
            raise RolloutError(
                f"the reward came to no verdict on {len(undecided)} of the last {len(self._last)} attempts; allowed: "
                f"rollout.undecided_share = {self._share:g} of {self._window}. {_most_frequent(undecided)}"
            )


def _most_frequent(reasons: list[str]) -> str:
    (kind, count), *_ = Counter(map(_kind, reasons)).most_common(1)
    reason = next(each for each in reversed(reasons) if _kind(each) == kind)
    return f"The most frequent reason, {count} times: {reason[:SHOWN]}"


def _kind(reason: str) -> str:
    """Returns a reason without its numbers: ports, sizes and times tell no two kinds apart."""
    return re.sub(r"\d+", "#", reason)
