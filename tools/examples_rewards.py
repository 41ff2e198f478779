"""Reward functions that go wrong, for tools/run_examples.py: always, or for a share of the answers."""

from __future__ import annotations

import time
import zlib
from typing import Any

from examples.sums import brief

SHARE = 0.25


def _struck(sample: dict[str, Any]) -> bool:
    asked = sample["messages"][-1]["content"] + sample["text"]
    return zlib.crc32(asked.encode()) / 2**32 < SHARE


def raises(sample: dict[str, Any]) -> dict[str, float]:
    """Returns what `brief` does; for a share of the answers it raises."""
    if _struck(sample):
        raise ValueError("this answer cannot be read")
    return brief(sample)


def hangs(sample: dict[str, Any]) -> dict[str, float]:
    """Returns what `brief` does; for a share of the answers it does not end."""
    while _struck(sample):
        time.sleep(1)
    return brief(sample)


def eats(sample: dict[str, Any]) -> dict[str, float]:
    """Returns what `brief` does; for a share of the answers it wants more memory than there is."""
    if _struck(sample):
        return {"reward": float(len(bytearray(1 << 40)))}
    return brief(sample)


def always_raises(sample: dict[str, Any]) -> float:
    """Returns nothing."""
    raise ValueError(f"no answer can be read, and not {len(sample['text'])} characters")
