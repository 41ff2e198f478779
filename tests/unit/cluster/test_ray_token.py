"""The token of Ray clusters that a run starts for itself. tests/unit/conftest.py takes it away again."""

from __future__ import annotations

import os

from ctpo_megatron.cluster.ray_token import require_token


def test_a_token_is_drawn() -> None:
    assert "RAY_AUTH_TOKEN" not in os.environ
    require_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    drawn = os.environ["RAY_AUTH_TOKEN"]
    assert len(drawn) == 64
    require_token()
    assert os.environ["RAY_AUTH_TOKEN"] == drawn, "kept, as that of a job's file must be"
