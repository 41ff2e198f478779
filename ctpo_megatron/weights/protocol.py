"""How weights travel from the trainer to the inference servers: the words that all transports share.

    driver (publisher)         senders (trainer ranks)                servers
    connect(servers) --------> WeightSender.connect
    publish(version) --------> WeightSender.send: buckets ----------> hold the new weights
                     <-------- Sent: digests of what was sent
    compare with the digests of what the servers hold

One rank per pipeline stage, or per stage and expert-parallel place, sends what lies there (`models.owners`); no rank gathers all
experts. Senders take turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ctpo_megatron.engine.calls import Server
from ctpo_megatron.engine.checksums import EngineDigests

Bucket = list[tuple[str, Tensor]]
"""Full tensors under their Hugging Face names, gathered and sent together."""


@dataclass(slots=True)
class Sent:
    """What one sender, or all senders together, sent for a version."""

    version: int
    tensors: int = 0
    bytes: int = 0
    digests: EngineDigests = field(
        default_factory=list
    )  # of an engine's tensors, as far as the Hugging Face tensors sent make them
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: gather, send, digest ...

    def merge(self, other: Sent) -> Sent:
        """The sum of both; digests of the parts of one engine tensor add up mod 2**64."""
        digests = [dict(each) for each in self.digests or other.digests]
        if self.digests and other.digests:
            for mine, theirs in zip(digests, other.digests, strict=True):
                for name, value in theirs.items():
                    mine[name] = (mine.get(name, 0) + value) % 2**64
        phases = self.seconds.keys() | other.seconds.keys()
        seconds = {phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0) for phase in phases}
        return Sent(self.version, self.tensors + other.tensors, self.bytes + other.bytes, digests, seconds)


class WeightSender(Protocol):
    """One sending rank's end of a transport."""

    def connect(self, servers: list[Server], api_key: str) -> None:
        """Reach all ranks of all servers; called again whenever the servers have changed, it leaves the old ones first.

        Raises WeightSyncError, naming the servers that did not come, within the configured time.
        """
        ...

    def send(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Give the servers this sender's tensors. Generation must be paused and an update session open.

        Raises WeightSyncError, naming the servers that failed, within the configured time; their weights are then undefined.
        """
        ...

    def close(self) -> None:
        """Leave the servers."""
        ...
