"""Rewards that go wrong, by import path, for the runs of tools/alarms_real.py. Each process of a reward counts its own calls."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import Any

LONGEST = 96  # tokens of a response of the quickstart
LEAK = 1_500_000  # bytes a call
CALLS_A_STEP = 32  # of each of two processes, where a step has 64 answers

_calls = count()
_kept: list[bytearray] = []


def pays_for_length(sample: dict[str, Any]) -> float:
    """Returns the share of the longest response that this one has."""
    return min(float(sample["response_tokens"]) / LONGEST, 1.0)


def loses_its_way(sample: dict[str, Any]) -> float:
    """Returns 0; raises for a share of the answers that grows by 0.6 % with every step."""
    number = next(_calls)
    drawn = int.from_bytes(hashlib.sha256(f"{number} {sample['text']}".encode()).digest()[:4], "big") / 2**32
    if drawn < 0.006 * number / CALLS_A_STEP:
        raise ValueError("this grader was made to come to no verdict")
    return 0.0


def leaks(sample: dict[str, Any]) -> float:
    """Returns 0, and keeps 1.5 MB of memory with every call."""
    _kept.append(bytearray(b"\x01" * LEAK))
    return 0.0
