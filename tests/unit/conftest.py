"""Unit tests work on small tensors, where more than one thread would only wait, and leave the environment as it was."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_token_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ctpo` sets these for the Ray that it is about to start; Ray in this process would not know of them later."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that its absence is restored too
        monkeypatch.delenv(name)
