"""Every error this package raises on purpose.

Each class is also a standard exception, so callers may catch either, and each can be pickled, so it survives the trip out of
a Ray actor. `exit_code` is what the `ctpo` command ends with: 2 for what the user can mend in the input, 1 for all else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class RehearsalError(CtpoError, RuntimeError):
    """A training step could not be rehearsed; the run itself may be possible."""


class RolloutError(CtpoError, RuntimeError):
    """Generation failed in a way that retrying did not mend."""


class EngineError(CtpoError, RuntimeError):
    """An inference server could not be started, died, or answered with an error."""


class EngineRefused(EngineError):
    """An inference server understood a request and refused it: asking again, or another server, would not help."""


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
    """A loss, gradient or log-prob is not a finite number."""


class CheckpointError(CtpoError, RuntimeError):
    """A checkpoint could not be written, found or read."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written: a file is missing, cut short, or holds other bytes."""


class ProcessDied(CtpoError, RuntimeError):
    """A process of the run ended on its own; the message names it, its exit code and its log."""


def near_miss(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` when one of `allowed` is close to `name`, otherwise an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
