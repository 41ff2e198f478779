"""Keys of attempts: who has one speaks for its attempt, and for no other."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from ctpo_megatron.agents.protocols import Episode

NAME_LENGTH = 16


def new_key() -> str:
    """Returns a new key: 192 bits that nobody guesses, in the form that clients expect of keys."""
    return f"sk-{secrets.token_urlsafe(24)}"


def name_of(key: str) -> str:
    """Returns the attempt's public name, 16 hexadecimal digits: the part of its URL, and what logs may show. It tells no key."""
    return hashlib.sha256(key.encode()).hexdigest()[:NAME_LENGTH]


def given_keys(headers: Mapping[str, str]) -> list[str]:
    """Returns the keys that a request brings, at most two: as OpenAI's clients send them (Bearer), and as Anthropic's do."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    bearer = [token.strip()] if scheme.lower() == "bearer" and token.strip() else []
    own = headers.get("x-api-key", "").strip()
    return [*bearer, own] if own and own not in bearer else bearer


class KeyedEpisodes:
    """Attempts by their keys; an `Episodes`. It outlives the server, so an endpoint that is started again loses none."""

    def __init__(self) -> None:
        self._episodes: dict[str, tuple[bytes, Episode]] = {}

    def __len__(self) -> int:
        return len(self._episodes)

    def add(self, key: str, episode: Episode) -> None:
        """Give `key` to the agent of `episode`."""
        self._episodes[name_of(key)] = (_digest(key), episode)

    def remove(self, key: str) -> None:
        """Take the key back; requests with it are refused from now on."""
        self._episodes.pop(name_of(key), None)

    def find(self, key: str) -> Episode | None:
        """Returns the episode whose agent was given `key`. How long it takes tells nothing of the keys that there are."""
        digest, episode = self._episodes.get(name_of(key), (b"", None))
        return episode if hmac.compare_digest(digest, _digest(key)) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
