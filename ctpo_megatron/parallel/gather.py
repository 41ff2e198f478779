"""The collective that this package uses, under the name that the installed torch has for it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_gather_single(gathered: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `gathered` with `mine` of every rank of `group`, in rank order along the first dimension.

    torch 2.14 calls it `all_gather_single` and deprecates `all_gather_into_tensor`, the only name that torch 2.11 knows.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, mine, group=group)
