"""Which attempt a key belongs to. Each attempt has a key of its own, from its beginning to its end."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from ctpo_megatron.agents.protocols import Episode

KEY_BYTES = 24
PREFIX = "sk-"  # some clients look at it before they send a key


class Desk:
    """The attempts that are open now (`agents.protocols.Episodes`).

    Keys are looked up by their hashes, so how long a look-up takes tells nothing about them.
    """

    def __init__(self) -> None:
        self._open: dict[bytes, Episode] = {}

    def __len__(self) -> int:
        """Returns how many are open."""
        return len(self._open)

    def find(self, key: str) -> Episode | None:
        """Returns the episode that `key` was drawn for; None: there is none, or it has ended."""
        return self._open.get(_hash(key))

    def open(self, episode: Episode, key: str | None = None) -> str:
        """Returns the key of `episode` from now on: a fresh one, or the one that it had before a restart."""
        key = key or new_key()
        self._open[_hash(key)] = episode
        return key

    def close(self, key: str) -> None:
        """Let `key` open nothing any more. Safe to call twice."""
        self._open.pop(_hash(key), None)

    @contextmanager
    def opened(self, episode: Episode) -> Iterator[str]:
        """Yield a key that opens `episode` within the block."""
        key = self.open(episode)
        try:
            yield key
        finally:
            self.close(key)


def new_key() -> str:
    """Returns a key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
