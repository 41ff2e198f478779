"""All random states of a rank: Python's, numpy's, torch's, the device's, and megatron's tracker of named ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def random_file(rank: int) -> str:
    """Returns where in a checkpoint the states of a rank lie."""
    return f"random/rank_{rank:05d}.pt"


def capture() -> dict[str, Any]:
    """Returns the states as plain values and tensors, so that reading them back runs no foreign code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore(checkpoint: Path, rank: int) -> None:
    """Go on from the states of `rank` in a checkpoint."""
    set_states(torch.load(checkpoint / random_file(rank), weights_only=True))


def set_states(states: dict[str, Any]) -> None:
    """Go on from what `capture` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
