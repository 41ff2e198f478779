"""Work that one rank does for all."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from ctpo_megatron.errors import CheckpointError


def on_first_rank(action: Callable[[], object], failure: str) -> None:
    """Run `action` on rank 0 while the others wait; what goes wrong there is raised on every rank, as CheckpointError."""
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, TypeError, ValueError) as caught:
            error = caught
    verdict = [None if error is None else f"{failure}: {error}"]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise CheckpointError(verdict[0]) from error
