"""Work that one rank does for all, and verdicts that all ranks share."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from ctpo_megatron.errors import CheckpointError, CheckpointUnwritten, mendable, reason
from ctpo_megatron.parallel.plain import all_gather_plain, broadcast_plain


def on_first_rank(action: Callable[[], object], failure: str, group: dist.ProcessGroup | None = None) -> None:
    """Run `action` on rank 0 while the others wait; what goes wrong there is raised on every rank, as CheckpointError.

    Where the storage is at fault, and the fault may pass, it is a CheckpointUnwritten. `group` holds all ranks; None: the default
    group.
    """
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, TypeError, ValueError, CheckpointError) as caught:
            error = caught
    mine = None if error is None else (f"{failure}: {reason(error)}", mendable(error))
    verdict = broadcast_plain(mine, tuple[str, bool] | None, group)
    if verdict is not None:
        words, may_pass = verdict
        raise (CheckpointUnwritten if may_pass else CheckpointError)(words) from error


def first_complaint(complaint: str | None) -> str | None:
    """The complaint of the lowest rank that has one, the same on every rank; None when no rank has any."""
    return next((each for each in all_gather_plain(complaint, str | None) if each), None)
