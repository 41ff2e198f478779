"""Counts, on a CPU, the operations that would make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Inside it `count` grows by one whenever a number is read out of a tensor, as by `int` and `item`."""

    count = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
