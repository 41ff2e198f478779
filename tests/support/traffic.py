"""Collectives counted where they reach the process group, whatever function of torch.distributed they come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """An operation of a process group."""

    name: str  # c10d's
    sizes: tuple[int, ...]  # bytes of each tensor that it takes: for a gather, what comes in and what this rank gives


class Traffic(TorchDispatchMode):
    """The calls made inside, in `calls`; also those of a backward that runs inside."""

    NAMESPACES = ("c10d", "_c10d_functional")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation of c10d, and run it."""
        if operation.namespace in self.NAMESPACES:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            name = operation.overloadpacket.__name__
            self.calls.append(Call(name, tuple(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return operation(*args, **(kwargs or {}))
