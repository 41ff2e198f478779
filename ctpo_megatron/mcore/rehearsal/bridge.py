"""What stands in, in a rehearsal, for values that fake tensors do not have, and what a rehearsal therefore does not show.

Fake tensors have shapes, formats and lifetimes, and no values. Where Megatron-Core 0.16.1 asks the device for a value, the answer
is made up here: experts are chosen evenly, pipeline stages send what the layout says. tests/dist/test_rehearsal.py tells when a
bridge is no longer needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctpo_megatron.mcore.rehearsal.inputs import even


@dataclass(frozen=True, slots=True)
class Bridge:
    """One place where a value is made up."""

    name: str
    instead: str  # what happens in a rehearsal


BRIDGES = (
    Bridge("numbers that the host reads", "are 1: loss, gradient norm, statistics, the optimizer's step count"),
    Bridge("experts' choices", "each expert gets the same number of tokens from every rank"),
    Bridge("the gloo group of background saves", "is fake like all others"),
    Bridge("Python objects of other ranks", "are taken for this rank's own"),
    Bridge("shapes that pipeline stages send each other", "are sent, and what comes in is taken for what the layout says"),
)
WITHOUT_SHAPES = ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_")  # collectives that torch cannot fake


class HostReads(TorchDispatchMode):
    """Inside it a number that the host reads from a fake tensor is 1, and a mask [experts, tokens] selects `top_k` per token.

    Tensors that are not fake, the borders of sequences and what is made of them, keep their values.
    """

    def __init__(self, top_k: int = 0) -> None:
        super().__init__()
        self.top_k = top_k

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what has no value; run anything else."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):  # the borders of sequences
            with unset_fake_temporarily():
                return operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if operation is torch.ops.aten.masked_select.default and self.top_k:
            return args[0].new_empty(args[1].shape[-1] * self.top_k)
        if operation.namespace == "c10d" and operation.overloadpacket.__name__ in WITHOUT_SHAPES:
            return FakeWork().boxed()
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def bridged(sent_shape: tuple[int, ...]) -> Iterator[None]:
    """Inside it megatron runs without values. `sent_shape`: of what pipeline stages send each other, [T / (cp * tp), 1, H]."""
    with contextlib.ExitStack() as stack:
        _replace(stack, MoEAlltoAllTokenDispatcher, "preprocess", _even_preprocess(MoEAlltoAllTokenDispatcher.preprocess))
        _replace(stack, P2PCommunicator, "_communicate_shapes", _known_shapes(P2PCommunicator._communicate_shapes, sent_shape))
        _replace(stack, torch.nn.Module, "_apply", _converted)
        _replace(stack, clip_grads, "l2_norm_impl", _norm)
        _replace(stack, dist, "all_gather_object", _same_object)
        new_group = dist.new_group
        _replace(stack, dist, "new_group", lambda *args, **options: new_group(*args, **{**options, "backend": "fake"}))
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, new: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, new)


def _converted(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` that gives parameters their new data, as torch does with real ones.

    Fake parameters torch exchanges for new ones, and then more than the weights stays alive.
    """
    for module in self.children() if recurse else ():
        module._apply(function)
    with torch.no_grad():
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.data = function(parameter.data)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = function(buffer)
    return self


def _same_object(objects: list[Any], mine: Any, group: Any = None) -> None:
    """Every rank's Python object is taken for what this rank has."""
    objects[:] = [mine] * len(objects)


def _norm(_size: int, _flag: Any, tensors: list[list[torch.Tensor]], *_options: Any) -> tuple[torch.Tensor, None]:
    """The norm [1] of all tensors. megatron's own for CPUs goes through Python numbers."""
    return torch.stack([torch.linalg.vector_norm(each) for each in tensors[0]]).norm().view(1), None


def _even_preprocess(original: Any) -> Any:
    """megatron's preparation of the dispatch, with its collective, then counts as if the router had chosen evenly."""

    def preprocess(self: Any, routing_map: torch.Tensor) -> Any:
        original(self, routing_map)
        counts = even(self.num_out_tokens, self.num_experts)
        first = self.local_expert_indices[0]
        mine = counts[first : first + self.num_local_experts]  # tokens of each local expert from one rank
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = counts.reshape(self.ep_size, self.num_local_experts).sum(1)
            self.output_splits = np.full(self.ep_size, mine.sum())
            self.output_splits_tp = np.full(self.tp_size, mine.sum() * self.ep_size)
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = np.tile(mine, (self.tp_size * self.ep_size, 1))
        order = np.arange(self.num_experts * self.tp_size)
        self.sort_input_by_local_experts = order.reshape(-1, self.num_local_experts).T.ravel()
        self.restore_output_by_local_experts = order.reshape(self.num_local_experts, -1).T.ravel()
        return mine * (self.tp_size * self.ep_size)

    return preprocess


def _known_shapes(original: Any, shape: tuple[int, ...]) -> Any:
    """megatron's exchange of shapes, with its messages, then the shapes that are known."""

    def communicate(self: Any, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
        original(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        return shape if recv_prev else [0, 0, 0], shape if recv_next else [0, 0, 0]

    return communicate
