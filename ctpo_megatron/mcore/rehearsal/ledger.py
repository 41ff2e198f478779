"""What a step does on fake tensors: the bytes of all tensors that live, moment by moment, and what goes over each group."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

KINDS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
# megatron's descriptions of groups, as `ctpo plan` names them
GROUPS = {
    "default_pg": "all",
    "TENSOR_MODEL_PARALLEL_GROUP": "TP",
    "CONTEXT_PARALLEL_GROUP": "CP",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "TP x CP",
    "DATA_PARALLEL_GROUP": "DP",
    "DATA_PARALLEL_GROUP_WITH_CP": "DP x CP",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "TP x DP x CP",
    "PIPELINE_MODEL_PARALLEL_GROUP": "PP",
    "EMBEDDING_GROUP": "first and last PP",
    "EXPERT_MODEL_PARALLEL_GROUP": "EP",
    "EXPERT_TENSOR_PARALLEL_GROUP": "ETP",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "EP x ETP",
    "EXPERT_DATA_PARALLEL_GROUP": "EDP",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "all, for the norm",
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of one kind on one group in the rehearsed step."""

    kind: str  # one of the values of KINDS, or c10d's own name
    group: str  # one of the values of GROUPS, or megatron's own description
    size: int  # ranks of the group
    calls: int
    bytes: int  # what this rank gives to them; of `receive`, what it gets


class Ledger(TorchDispatchMode):
    """Counts inside it. Enter it after the fake tensor mode, whose results it looks at.

    `live`: bytes by label of storages that are alive; a storage keeps the `label` of the moment when it was made.
    `peak`: `live` when the sum was largest, since `watch`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.label = "other"
        self._total, self._peak_total, self._watching = 0, 0, False
        self._known = WeakIdKeyDictionary()  # storages that are counted, with their finalizers
        self._calls: Counter[tuple[str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, int]] = Counter()

    @property
    def traffic(self) -> list[Traffic]:
        """All calls since `watch`, largest first."""
        found = [Traffic(*key, self._calls[key], self._bytes[key]) for key in self._calls]
        return sorted(found, key=lambda each: -each.bytes)

    def watch(self) -> None:
        """Forget peak and calls, and begin to count them."""
        self._watching = True
        self._calls.clear()
        self._bytes.clear()
        self._peak_total, self.peak = self._total, self.live.copy()

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors`, where they are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            size, label = storage.nbytes(), self.label
            self._known[storage] = weakref.finalize(storage, self._freed, label, size)
            self.live[label] += size
            self._total += size
        if self._watching and self._total > self._peak_total:
            self._peak_total, self.peak = self._total, self.live.copy()

    def _freed(self, label: str, size: int) -> None:
        self.live[label] -= size
        self._total -= size

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; note what it makes, and what goes over a group."""
        if operation.namespace == "c10d" and self._watching:
            self._count(operation.overloadpacket.__name__, args)
        result = operation(*args, **(kwargs or {}))
        self.note(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _count(self, name: str, args: Any) -> None:
        groups = [each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type())]
        if not groups:
            return
        group = dist.ProcessGroup.unbox(groups[0])
        tensors = [[leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in args[:2]]
        given = tensors[-1] or tensors[0]  # what is given stands after what is filled, where there is both
        key = (KINDS.get(name, name), GROUPS.get(group.group_desc, group.group_desc), group.size())
        self._calls[key] += 1
        self._bytes[key] += sum(tensor.nbytes for tensor in given)
