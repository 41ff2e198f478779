"""The Ray shell around a shelf. Neither torch nor megatron is imported in this process."""

from __future__ import annotations

from pathlib import Path

import ray

from ctpo_megatron.cluster.keepers.shelf import Bytes, Shelf
from ctpo_megatron.cluster.logs import redirect_output

THREADS = 4  # calls at a time: copying leaves the interpreter to others


class KeeperActor:
    """Holds parts of copies for the ranks of a node."""

    def __init__(self, log_path: str) -> None:
        redirect_output(Path(log_path))
        self._shelf = Shelf()

    def begin(self, step: int, rank: int, size: int, stays: int | None) -> None:
        """Make room for a part: `Shelf.begin`."""
        self._shelf.begin(step, rank, size, stays)

    def put(self, step: int, rank: int, begin: int, piece: Bytes) -> None:
        """Take a piece of it: `Shelf.put`."""
        self._shelf.put(step, rank, begin, piece)

    def finish(self, step: int, rank: int, contents: bytes) -> None:
        """Take what describes it: `Shelf.finish`."""
        self._shelf.finish(step, rank, contents)

    def retain(self, step: int) -> None:
        """Let all other copies go: `Shelf.retain`."""
        self._shelf.retain(step)

    def contents(self, step: int, rank: int) -> bytes:
        """What describes a part: `Shelf.contents`."""
        return self._shelf.contents(step, rank)

    def read(self, step: int, rank: int, begin: int, end: int) -> Bytes:
        """Bytes of a part: `Shelf.read`."""
        return self._shelf.read(step, rank, begin, end)

    def node(self) -> str:
        """Where this process is. That it says so is a sign of life."""
        return ray.get_runtime_context().get_node_id()
