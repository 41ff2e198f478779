"""How weights travel from the trainer to the inference servers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Bucket = list[tuple[str, Tensor]]
"""Full tensors under their Hugging Face names, gathered and sent together."""


class WeightSender(Protocol):
    """The trainer's end of a transport; lives in the process of the sending rank."""

    def connect(self, urls: list[str], api_key: str, engine_tp: int) -> None:
        """Reach all ranks of all servers. Called once, before the first `send`."""
        ...

    def send(self, buckets: Iterable[Bucket], version: int) -> None:
        """Replace the servers' weights; they report `version` from then on. Generation must be paused.

        Raises WeightSyncError within the configured time; the servers' weights are then undefined.
        """
        ...

    def close(self) -> None:
        """Leave the servers."""
        ...
