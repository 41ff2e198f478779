"""What a run writes, carried over faults of its storage: full, read-only, stale, or with the run's directory away.

    write       records of the driver (metrics, events, journal, trajectories): done at once. One that fails is held
                in memory with all that follow, in their order, and one task tries again every few seconds
    patiently   what has an answer, or is the ranks' to write (checkpoints, the exported model): tried again until it succeeds,
                while its caller waits
    attempt     what others hold themselves (TensorBoard, whose thread tries again as `record.aside` says)
    clear       the loop, at the end of a step: waits until nothing is held, so a run is never further than that step ahead of
                what it has written. Rollouts that are under way go on meanwhile, and are kept

A fault begins with the first write that fails and ends when nothing is held and nobody tries any more: an event each. It may last
`wait_s`, and `stop_s` where the run is asked to stop; then whoever waits raises what the storage said, and the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ctpo_megatron.errors import StorageError, mendable, storing
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.record.heartbeat import Stages
from ctpo_megatron.record.storage_events import StorageFault, StorageGivenUp, StorageMended

T = TypeVar("T")

RETRY_S = 2.0  # between two tries
LONGEST_RETRY_S = 30.0  # to which the pause of `patiently` grows: what it tries may be as large as a checkpoint
POLL_S = 0.2
LAST_TRY_S = 5.0  # when the run ends
MARK = "config.yaml"  # a file that tells the run's directory from an empty one in its place, where its file system is not mounted


@dataclass(slots=True)
class _Fault:
    """A fault that holds on. `error`: the newest that came of it."""

    began: float
    error: BaseException
    held: int = 0  # writes so far


class Storage:
    """The storage of the run in `run_dir`. Belongs to one event loop; every write is for this process alone to do.

    Outside of `outlasting`, and where `wait_s` is 0, nothing is held or tried again: what fails is raised at once. So too errors
    that nobody can mend.
    """

    def __init__(self, run_dir: Path = Path(), wait_s: float = 0.0, stop_s: float = 0.0, *, retry_s: float = RETRY_S) -> None:
        self._run_dir, self._wait_s, self._stop_s, self._retry_s = run_dir, wait_s, stop_s, retry_s
        self._emit: Emit = discard
        self._stages = Stages()
        self._home: os.stat_result | None = None  # the run's directory; None: not patient
        self._held: deque[Callable[[], None]] = deque()
        self._fault: _Fault | None = None
        self._trying = 0  # callers of `patiently` who have failed
        self._mender: asyncio.Task[None] | None = None
        self._broken: Exception | None = None  # of a write that was held, and that nobody can mend
        self._stopped_at: float | None = None
        self._closing = asyncio.Event()

    @property
    def patient(self) -> bool:
        """Whether faults are waited for."""
        return self._home is not None

    @property
    def held(self) -> int:
        """How many writes wait for a fault to be mended."""
        return len(self._held)

    @contextlib.asynccontextmanager
    async def outlasting(self, emit: Emit, stages: Stages | None = None) -> AsyncIterator[None]:
        """Inside it, faults of the storage are waited for. `emit` hears of them; `stages`: of the process, for who waits.

        On leaving, what is held is tried once more; what stays is told, and raised where nothing else ends the run.
        """
        if self._wait_s <= 0:
            yield
            return
        self._emit, self._stages = emit, stages or self._stages
        with storing(self._run_dir):
            self._home = self._run_dir.stat()
        failed = True
        try:
            yield
            failed = False
        finally:
            await self._close(failed)

    def stop(self) -> None:
        """The run was asked to stop: a fault that holds on, or begins, may last for `stop_s`."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()

    def require_home(self) -> None:
        """Raise StorageError where faults are waited for and the run's directory is away: nothing may be made in its place."""
        if self._home is None:
            return
        with storing(self._run_dir):
            found = self._run_dir.stat()
        if os.path.samestat(found, self._home):
            return
        if not (self._run_dir / MARK).exists():
            away = StorageError(f"{self._run_dir}: another directory is in its place; is its file system mounted?")
            away.mendable = True
            raise away
        self._home = found  # mounted again

    def write(self, work: Callable[[], None]) -> None:
        """Do `work`, or hold it until the storage takes it; what is half done when it fails may not matter when it is done again.

        Raises StorageError where the fault is not waited for.
        """
        error: StorageError | None = None
        if not self._held:
            try:
                self.attempt(work)
                return
            except StorageError as failure:
                if not self.patient or not failure.mendable:
                    raise
                error = failure
        self._hold(work, error)

    async def write_beside(self, work: Callable[[], None]) -> None:
        """`write` in a thread, for what takes its time, such as bringing a file onto the disk."""
        error: StorageError | None = None
        if not self._held:
            try:
                await asyncio.to_thread(self.attempt, work)
                return
            except StorageError as failure:
                if not self.patient or not failure.mendable:
                    raise
                error = failure
        self._hold(work, error)

    async def patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Returns what `work` returns, which is called again while the storage is at fault.

        Raises what it raised where that cannot be mended, or was not in time.
        """
        pause, failed, done, tried = self._retry_s, 0, False, False
        try:
            while True:
                try:
                    tried = False
                    self.require_home()
                    tried = True
                    found = await work()
                    done = True
                    return found
                except OSError as error:
                    if not self.patient or not mendable(error):
                        raise
                    self._trying, failed = self._trying + 1 - failed, 1
                    self._begin(error)
                    if self._left_s() <= 0:
                        raise
                await self._pause(pause)
                pause = min(2 * pause, LONGEST_RETRY_S) if tried else self._retry_s
        finally:
            self._trying -= failed
            self._end_fault(mended=done)

    async def clear(self) -> None:
        """Return when the run's directory is there and nothing is held. Raises StorageError where that does not come in time."""
        await self.patiently(self._at_home)
        while self._held and self._broken is None:
            if self._fault is not None and self._left_s() <= 0:
                raise self._fault.error
            await self._pause(POLL_S)
        if self._broken is not None:
            raise self._broken

    async def _at_home(self) -> None:
        self.require_home()

    def attempt(self, work: Callable[[], None]) -> None:
        """Do `work` now, in any thread, where the run's directory is there; what it raises comes out, and nothing is held."""
        self.require_home()
        work()

    def _hold(self, work: Callable[[], None], error: StorageError | None) -> None:
        self._held.append(work)  # first: the event of the fault comes behind it
        if error is not None:
            self._begin(error)
        if self._fault is not None:
            self._fault.held += 1
        if self._mender is None or self._mender.done():
            self._mender = asyncio.get_running_loop().create_task(self._mend())

    def _begin(self, error: BaseException) -> None:
        if self._fault is not None:
            self._fault.error = error
            return
        self._fault = _Fault(time.monotonic(), error)
        self._emit(StorageFault(str(error), self._wait_s if self._stopped_at is None else self._stop_s))

    def _end_fault(self, *, mended: bool) -> None:
        """End the fault if nobody waits for its end any more; `mended`: and not because it was given up."""
        fault = self._fault
        if fault is None or self._held or self._trying:
            return
        self._fault = None
        if mended:
            self._emit(StorageMended(time.monotonic() - fault.began, fault.held))

    def _left_s(self) -> float:
        """How long the fault may still last."""
        began = time.monotonic() if self._fault is None else self._fault.began
        until = began + self._wait_s
        if self._stopped_at is not None:
            until = min(until, max(began, self._stopped_at) + self._stop_s)
        return until - time.monotonic()

    async def _pause(self, seconds: float) -> None:
        """Wait for so long, and not beyond the time that the fault may last; a wish to stop may shorten that meanwhile.

        When all that was held is written, it is over: the storage takes things again.
        """
        end, held = time.monotonic() + seconds, bool(self._held)
        with self._stages("storage", waits_for=str(self._run_dir)) as stage:
            while (left := min(end - time.monotonic(), self._left_s())) > 0:
                stage.beat()
                await asyncio.sleep(min(left, POLL_S))
                if held and not self._held:
                    break

    async def _mend(self) -> None:
        while self._held:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._retry_s)
            await _in_thread(self._write_held)
            if self._closing.is_set():
                break
        self._end_fault(mended=True)

    def _write_held(self) -> None:
        """Do what is held, until something fails. Runs in a thread; while something is held nobody else writes."""
        while self._held:
            try:
                self.attempt(self._held[0])
            except Exception as error:  # noqa: BLE001 - raised by `clear`
                if self._fault is not None:
                    self._fault.error = error
                if isinstance(error, StorageError) and error.mendable:
                    return
                self._broken = self._broken or error
            self._held.popleft()

    async def _close(self, failed: bool) -> None:
        self._closing.set()
        if self._mender is not None:
            await asyncio.wait([self._mender], timeout=LAST_TRY_S)
            self._mender.cancel()
            await asyncio.gather(self._mender, return_exceptions=True)
        self._home = None
        lost = len(self._held)
        self._held.clear()  # what comes now is written at once, or fails
        if lost:
            error = StorageError("the storage did not answer") if self._fault is None else self._fault.error
            with contextlib.suppress(StorageError):  # its line will hardly find room; the console has it
                self._emit(StorageGivenUp(str(error), lost))
            if not failed:
                raise error
        if self._broken is not None and not failed:
            raise self._broken


async def _in_thread(work: Callable[[], None]) -> None:
    """Do `work`, which raises nothing, in a thread that does not keep the process alive: a file server may never answer."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        work()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="storage", daemon=True).start()
    await done.wait()
