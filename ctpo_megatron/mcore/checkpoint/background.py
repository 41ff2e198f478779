"""One save at a time, in a thread beside training, with a process group of its own so that no collective crosses training's."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from ctpo_megatron.errors import CheckpointError


class BackgroundSave:
    """The save that this rank has in flight, if any. Every rank makes one, in step with the others."""

    def __init__(self, timeout_minutes: int) -> None:
        # gloo: shards are in host memory, and the device's own collectives belong to training
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
        if not isinstance(group, dist.ProcessGroup):  # what torch gives to those who are not in it
            raise RuntimeError("this rank is not in the group of its own checkpoints")
        self.group = group
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._begun = 0.0

    def start(self, work: Callable[[dist.ProcessGroup], None]) -> None:
        """Run `work` in a thread. The one before must have been settled."""
        if self._thread is not None:
            raise RuntimeError("a save is in flight; settle it first")
        self._begun = time.monotonic()
        # a daemon: a disk that never answers must not keep the process alive
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for the save in flight; without one, return at once. Raises what it failed with, and CheckpointError when time
        runs out."""
        thread = self._thread
        if thread is None:
            return
        thread.join(timeout_s)
        if thread.is_alive():
            lasted = time.monotonic() - self._begun
            raise CheckpointError(f"the checkpoint begun {lasted:.0f} s ago is still being written; waited {timeout_s:.0f} s")
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[dist.ProcessGroup], None]) -> None:
        try:
            work(self.group)
        except BaseException as error:  # noqa: BLE001 - raised again by settle
            self._error = error
