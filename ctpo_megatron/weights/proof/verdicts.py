"""What the canaries of one version have said, and whether another attempt could say anything else."""

from __future__ import annotations

import math

from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.proof.canary import Gap, check_canary

ALIKE = 0.01  # relative, of two mean differences: rounding on GPUs varies, what is computed differently does not


class CanaryVerdicts:
    """The canaries of version `version`. A server is known by its name, which it keeps when it is started again."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._passed: list[Gap] = []
        self._differed: dict[str, Gap] = {}  # the newest of each server that did not pass
        self._twice = ""  # what was said of a server that has differed twice alike

    def judge(self, name: str, url: str, gap: Gap, tolerance: float) -> None:
        """Note what the server `name` at `url` has shown. Raises WeightSyncError where `gap` is more than `tolerance`."""
        before, self._differed[name] = self._differed.get(name), gap
        try:
            check_canary(url, self._version, gap, tolerance)
        except WeightSyncError as error:
            if before is not None and math.isclose(before.mean, gap.mean, rel_tol=ALIKE):
                self._twice = str(error)
            raise
        del self._differed[name]
        self._passed.append(gap)

    def check_curable(self) -> None:
        """Raise WeightSyncError where the same weights have led to the same difference twice, and no server has passed.

        Then the trainer and the servers compute different models: neither weights sent again nor servers started again help.
        """
        if self._twice and not self._passed:
            raise WeightSyncError(
                f"{self._twice}\nThe same weights, sent twice, led to the same difference, and no server has passed: sending "
                "them again or starting servers again would not help, so the run ends here."
            )

    def metrics(self) -> dict[str, float]:
        """The largest mean and the largest single difference of log-probs over the servers that passed; empty where none has."""
        if not self._passed:
            return {}
        mean, largest = max(gap.mean for gap in self._passed), max(gap.largest for gap in self._passed)
        return {"publish/canary_gap_mean": mean, "publish/canary_gap_max": largest}
