"""How often what a run has lost is started again, and after which wait: the trainer within the command, or the whole command."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.errors import BeginAgain, ProcessDied, TrainerLost
from ctpo_megatron.models.files import read_json
from ctpo_megatron.record.files import write_summary
from ctpo_megatron.record.run_events import TrainerRestarting

FIRST_WAIT_S = 2.0  # before the second restart in a row; it doubles from there
LONGEST_WAIT_S = 60.0


class Restarts:
    """Counts restarts of the trainer between which no training step was done; more than `most` of these end the run."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._step = -1

    def next(self, error: TrainerLost, step: int) -> TrainerRestarting:
        """Returns the restart that is to follow `error`, which came when `step` training steps were done.

        Raises ProcessDied where there have been enough.
        """
        self._count = 1 if step > self._step else self._count + 1
        self._step = max(step, self._step)
        if self._count > self._most:
            raise ProcessDied(f"{error}\n(cluster.restarts = {self._most} restarts brought no training step)") from error
        wait = 0.0 if self._count == 1 else min(FIRST_WAIT_S * 2 ** (self._count - 2), LONGEST_WAIT_S)
        return TrainerRestarting(str(error).splitlines()[0], self._count, self._most, wait)


def begin_again(error: ProcessDied, run_dir: Path, step: int, most: int) -> BeginAgain:
    """Returns the wish that the command begins anew after `error`, which came when `step` training steps were done.

    RUN_DIR/restarts.json counts such beginnings between which no step was done. Raises ProcessDied where there were `most`.
    """
    file = run_dir / "restarts.json"
    before = read_json(file) if file.is_file() else {"step": -1, "count": 0}
    count = 1 if step > before["step"] else before["count"] + 1
    if count > most:
        raise ProcessDied(f"{error}\n(cluster.restarts = {most} new beginnings brought no training step)") from error
    write_summary(run_dir, {"step": max(step, before["step"]), "count": count}, name=file.name)
    return BeginAgain(f"{error}: beginning anew, {count} of {most} without a step between")
