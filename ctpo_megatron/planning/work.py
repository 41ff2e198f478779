"""What activations are proportional to."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Work:
    """A micro-batch on one rank."""

    tokens: int  # on this rank, so the tokens of a micro-batch / cp
    element: int  # bytes of an activation: 2 in bfloat16, 4 in float32
    recompute: str = "none"
    attention_again: bool = False  # its output is kept once more, in fp8
