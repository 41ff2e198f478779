"""Which tensors have changed since the version that the servers hold: at the learning rates of RL most 16-bit weights do not."""

from __future__ import annotations

from collections.abc import Mapping

from ctpo_megatron.engine.checksums import PartDigests
from ctpo_megatron.engine.digest import Part, tensor_digests
from ctpo_megatron.models.owners import unit_of
from ctpo_megatron.weights.protocol import Bucket


class Changes:
    """Remembers the digests, 8 bytes each, of every tensor as the servers hold it. Without `enabled` everything has changed."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._held: dict[str, PartDigests] = {}
        self._sent: dict[str, PartDigests] = {}

    @property
    def full(self) -> bool:
        """Whether nothing is known of what the servers hold."""
        return not self._held

    @property
    def held(self) -> Mapping[str, PartDigests]:
        """The digests of what the servers hold, by name; nothing where that is not known."""
        return self._held

    def pick(self, bucket: Bucket, digests: Mapping[str, PartDigests] | None = None) -> Bucket:
        """The tensors of `bucket` to send, in its order: units (see `unit_of`) in which anything differs bitwise.

        `digests`: of every tensor of the bucket, all of it in one or several parts, where they are known already.
        """
        if not self.enabled:
            return bucket
        if digests is None:
            found = tensor_digests(Part(tensor) for _, tensor in bucket)
            digests = {name: (digest,) for (name, _), digest in zip(bucket, found, strict=True)}
        now = {name: digests[name] for name, _ in bucket}
        changed = {unit_of(name) for name, each in now.items() if self._held.get(name) != each}
        self._sent |= now
        return [(name, tensor) for name, tensor in bucket if unit_of(name) in changed]

    def commit(self) -> None:
        """Note that all that was picked has arrived."""
        self._held |= self._sent
        self._sent = {}

    def forget(self) -> None:
        """Make the next publication a full one: the servers are others, or what they hold is not known."""
        self._held, self._sent = {}, {}
