"""What a rank does with keepers: it hands its part over, and reads parts back. Every wait is bounded.

Pieces go through Ray's object store, one of a rank at a time, and are copied out of it at the other end: so little of the store
is taken, however large the state is. A store that is full of other things makes a piece wait, and Ray move some of these to its
disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ctpo_megatron.checkpoints.hashes import bytes_hash
from ctpo_megatron.errors import CopyLost

if TYPE_CHECKING:  # the ranks import it when they are built
    from ctpo_megatron.mcore.checkpoint.part import Bytes, Contents, Part

PIECE = 2**24  # bytes
ANSWER_S = 60.0  # a keeper that takes longer for a piece counts as lost


@dataclass(frozen=True, slots=True)
class Handed:
    """Says that a keeper has all of a rank's part. `digest`: of its contents."""

    size: int
    digest: str
    scheduler_steps: int


def hand_over(part: Part, keeper: Any, step: int, rank: int, stays: int | None) -> Handed:
    """Send `part` to `keeper`, where it takes the place of all but the copy after step `stays`. Raises CopyLost."""
    _call(keeper.begin, step, rank, part.size, stays)
    for begin, piece in part.pieces(PIECE):
        _call(keeper.put, step, rank, begin, piece)
    contents = part.contents()
    packed = contents.packed()
    _call(keeper.finish, step, rank, packed)
    return Handed(part.size, bytes_hash(packed), contents.scheduler_steps)


def contents_of(keeper: Any, step: int, rank: int, digest: str) -> Contents:
    """Returns what describes the part of `rank`. Raises CopyLost where it is gone or has another digest."""
    from ctpo_megatron.mcore.checkpoint.part import Contents

    return Contents.parse(_call(keeper.contents, step, rank), digest)


def reader(keepers: Sequence[Any], step: int, progress: Callable[[], None]) -> Callable[[int, int, int], Bytes]:
    """Returns what reads bytes of the parts that `keepers` hold, one for each rank. `progress` is called after each reading."""

    def read(rank: int, begin: int, end: int) -> Bytes:
        found: Bytes = _call(keepers[rank].read, step, rank, begin, end)
        progress()
        return found

    return read


def _call(method: Any, *args: Any) -> Any:
    """Returns the answer to a call of a keeper's method. Raises CopyLost."""
    try:
        return ray.get(method.remote(*args), timeout=ANSWER_S)
    except GetTimeoutError as error:
        raise CopyLost(f"a keeper has not answered for {ANSWER_S:.0f} s") from error
    except RayTaskError as error:
        raise CopyLost(str(error.cause)) from error
    except RayError as error:
        raise CopyLost(f"a keeper is gone: {str(error).splitlines()[0]}") from error
