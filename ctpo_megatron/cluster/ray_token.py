"""The token that Ray clusters started by a run ask for. Ray reads it when it is imported, so this file imports no ray."""

from __future__ import annotations

import os
import secrets


def require_token() -> None:
    """Let only those who have a token, drawn here, use clusters that this process starts. Keeps a token that is set already.

    To be called before ray is imported. Processes that Ray starts inherit the environment.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
