"""The key that a remote sandbox asks for: the content of a file, at both ends. It is in no command line, configuration or log."""

from __future__ import annotations

import hmac
from pathlib import Path

from ctpo_megatron.errors import ConfigError, storage_words

SHORTEST = 16
_SCHEME = "Bearer "


def read_key(path: str | Path, what: str) -> str:
    """Returns the key in the file `path`, without white space around it. Raises ConfigError; `what` names the setting."""
    try:
        key = Path(path).read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        key = ""
    except OSError as error:
        raise ConfigError(f"{what}: {storage_words(error, path)}") from error
    if len(key) < SHORTEST or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{what}: {path} holds no key; wanted is one line of at least {SHORTEST} letters, digits or signs. "
            f"`(umask 077; openssl rand -hex 32 > {path})` makes one."
        )
    return key


def header(key: str) -> dict[str, str]:
    """What a request carries."""
    return {"Authorization": f"{_SCHEME}{key}"}


def fits(given: str, key: str) -> bool:
    """Whether a request's `Authorization` shows `key`; the time that this takes tells nothing of the key."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), f"{_SCHEME}{key}".encode())
