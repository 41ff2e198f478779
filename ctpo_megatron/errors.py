"""Every error this package raises on purpose.

Each class is also a standard exception, so callers may catch either, and each can be pickled, so it survives the trip out of
a Ray actor. `exit_code` is what the `ctpo` command ends with: 2 for what the user can mend in the input, 75 (EX_TEMPFAIL) for a
run that was stopped in order, 1 for all else.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_WORDS = ("no space left on device", "disk quota exceeded")  # of libraries that keep the system's words and lose its number
# what may pass: somebody frees space, mounts a file system again, gives back a right, starts a file server, renews a ticket
_MENDABLE = {
    *_FULL,
    errno.EROFS,
    errno.ENOENT,
    errno.ESTALE,
    errno.EIO,
    errno.EREMOTEIO,
    errno.EACCES,
    errno.EPERM,
    errno.EKEYEXPIRED,
    errno.ENOKEY,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
}
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")  # how safetensors writes the system's number
_NEARLY_NOTHING = 1 << 16  # bytes free, below which a write that failed is taken to have failed for want of room


class CtpoError(Exception):
    """Base of all errors raised on purpose. The first argument is a complete message for a person."""

    exit_code = 1


class InputError(CtpoError, ValueError):
    """Something the user gave cannot be used; nothing was started."""

    exit_code = 2


class ConfigError(InputError):
    """A key or value of the configuration is wrong."""


class DataError(InputError):
    """A data file is missing, unreadable, or lacks what training needs."""


class ModelError(InputError):
    """A model directory is missing files, or describes a model this package cannot train."""


class RenderError(InputError):
    """A chat template cannot write a conversation, or writes it otherwise than it is built here. The message names no row."""


class StorageError(CtpoError, OSError):
    """A file could not be written or read for a reason that lies with the host: no space, no permission, a broken disk.

    `mendable`: whether somebody may mend it while the run waits.
    """

    mendable = False


class RehearsalError(CtpoError, RuntimeError):
    """A training step could not be rehearsed; the run itself may be possible."""


class RolloutError(CtpoError, RuntimeError):
    """Generation failed in a way that retrying did not mend."""


class EngineError(CtpoError, RuntimeError):
    """An inference server could not be started, died, or answered with an error."""


class EngineRefused(EngineError):
    """An inference server understood a request and refused it: asking again, or another server, would not help."""


class NoServerLeft(EngineError):
    """No inference server serves, and none is to be expected: nothing can be sampled any more."""


class AsideLost(EngineError):
    """The servers that kept the weights of an evaluation are gone, or hold others."""


class TeacherFailed(EngineError):
    """No server of a teacher answered a request, however often it was sent again: the attempt that it was for has failed."""


class WeightSyncError(CtpoError, RuntimeError):
    """Publishing weights to the inference servers failed or could not be proven right.

    `servers` are the URLs of those that failed, where that is known: the others may be connected again without them.
    """

    def __init__(self, message: str, *, servers: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.servers = tuple(servers)


class MismatchError(CtpoError, RuntimeError):
    """Trainer and inference engine disagree about log-probs by more than the configured bound."""


class NonFiniteError(CtpoError, ArithmeticError):
    """A loss, gradient or log-prob is not a finite number.

    `sequence`: number in its rollout batch of the first sequence that has one, where that is known.
    """

    def __init__(self, message: str, *, sequence: int | None = None) -> None:
        super().__init__(message)
        self.sequence = sequence


class CheckpointError(CtpoError, RuntimeError):
    """A checkpoint could not be written, found or read."""


class CheckpointUnwritten(CheckpointError, StorageError):
    """A checkpoint or model could not be written for a reason that lies with the storage, and may pass."""

    mendable = True


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written: a file is missing, cut short, or holds other bytes."""


class CopyLost(CheckpointError):
    """A copy of the trainer's state in memory is gone, incomplete, of another layout, or not what was handed over."""


class ProcessDied(CtpoError, RuntimeError):
    """A process of the run ended on its own; the message names it, its exit code and its log."""


class TrainerLost(ProcessDied):
    """A rank of the trainer died or hangs; the servers and what they sample are not touched by it."""


class NoRoom(CtpoError, RuntimeError):
    """Ray had no room for processes of the run within the time that it has for this."""


class RayLost(ProcessDied):
    """A process of Ray's own died, and with it all that ran on its node: the command has to begin anew, and can go on."""


class StartLost(ProcessDied):
    """A server's process was killed while the run came up. Nothing is known to be wrong with it: the command may begin anew."""


class LeftCourse(CtpoError, RuntimeError):
    """The loss or the reward of the last training step, `step`, shows that the run has left its course after step `good`."""

    def __init__(self, message: str, *, step: int, good: int) -> None:
        super().__init__(message)
        self.step, self.good = step, good


class StoppedInOrder(CtpoError, RuntimeError):
    """The run was asked to stop, and everything it had is saved; the same command with `--resume auto` goes on."""

    exit_code = 75


class BeginAgain(CtpoError, RuntimeError):
    """The command cannot go on in this process, but in a new one with `--resume auto`; all that could be saved is saved."""


def near_miss(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` when one of `allowed` is close to `name`, otherwise an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def told(error: BaseException) -> tuple[str, int]:
    """Returns the message for a person about whatever ended a command, and the command's exit code."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CtpoError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "the host has no memory left for this process", 1
    if isinstance(error, OSError) and (error.filename is not None or out_of_space(error)):
        return storage_words(error), 1
    library = type(error).__module__.partition(".")[0]
    if library == "jinja2":
        return f"the model's chat template cannot be used: {error}", 2
    origin = "" if library in ("builtins", "asyncio", "__main__") else f" (from {library})"
    words = " ".join(str(error).split()) or "without a message"
    return f"unexpected {type(error).__name__}{origin}: {words}. Run it again with --debug to see where it came from.", 1


@contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Inside it, what the system raises while `path` is written becomes a StorageError that names it and says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        failure = StorageError(storage_words(error, path))
        failure.mendable = mendable(error)
        raise failure from error


def mendable(error: BaseException, path: str | Path | None = None) -> bool:
    """Whether `error`, which came when `path` was written, lies with the storage, and may pass.

    What is no OSError, or was wrapped by a library, is told by what it came from, and by the space that is left.
    """
    for each in _chain(error):
        if isinstance(each, StorageError) and each.mendable:
            return True
        if isinstance(each, OSError) and each.errno in _MENDABLE:
            return True
        if (said := _RUST_NUMBER.search(str(each))) and int(said[1]) in _MENDABLE:
            return True
    return out_of_space(error, path)


def reason(error: BaseException, path: str | Path | None = None) -> str:
    """Returns why something failed, to follow on words that say what. `path`: what was being written or read, if anything was."""
    if isinstance(error, CtpoError):
        return str(error)
    if out_of_space(error, path) or isinstance(error, OSError):
        return storage_words(error, path)
    return str(error) or type(error).__name__


def storage_words(error: BaseException, path: str | Path | None = None) -> str:
    """Returns one sentence about a file that could not be used: which one, why, and what to do.

    `path`: what was being used, for errors that name no file of their own.
    """
    system = _system_error(error)
    named = getattr(system, "filename", None) or path
    where = "a file" if named is None else str(named)
    if out_of_space(error, named):
        return f"{where}: no space left on the file system{_free(named)}. Free some, or write to another one; then go on."
    number = None if system is None else system.errno
    if number in (errno.EACCES, errno.EPERM):
        return f"{where}: no permission. Change its owner or mode, or use another place."
    if number == errno.EROFS:
        return f"{where}: its file system is read-only. Use another place."
    if system is None or system.strerror is None:
        return f"{where}: {error}"
    return f"{where}: {system.strerror.lower()}"


def out_of_space(error: BaseException, path: str | Path | None = None) -> bool:
    """Whether `error` came because a file system, or the user's share of it, is full.

    Libraries report that in words of their own, so causes are looked at, and then the file system that `path` is on.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _FULL:
            return True
        if any(words in str(each).lower() for words in _FULL_WORDS):
            return True
    if isinstance(error, OSError) and error.errno is not None:
        return False  # the system has said what it was
    return path is not None and _free_bytes(path) < _NEARLY_NOTHING


def _system_error(error: BaseException) -> OSError | None:
    return next((each for each in _chain(error) if isinstance(each, OSError) and each.errno is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and what it came from, the nearest first."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _free(path: str | Path | None) -> str:
    try:
        total = 0 if path is None else shutil.disk_usage(_existing(path)).total
    except OSError:
        return ""
    return f" ({_free_bytes(path or '.') / 2**20:,.0f} of {total / 2**20:,.0f} MiB free)" if total else ""


def _free_bytes(path: str | Path) -> float:
    """Returns the bytes that this user may still write where `path` is or would be; infinity where that is not known."""
    try:
        found = os.statvfs(_existing(path))
    except OSError:
        return float("inf")
    return found.f_bavail * found.f_frsize if found.f_blocks else float("inf")


def _existing(path: str | Path) -> Path:
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
