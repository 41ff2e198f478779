"""A second set of weights in host memory, exchanged with the model's for a pass: a reference policy without a second model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class HostWeights:
    """One rank's shards of parameters and buffers, in the model's number formats and order; pinned where the model is on CUDA."""

    tensors: list[Tensor]

    @classmethod
    @torch.no_grad()
    def take(cls, models: Iterable[nn.Module]) -> HostWeights:
        """A copy of the weights as they are."""
        taken = [torch.empty_like(each, device="cpu", pin_memory=each.is_cuda) for each in _weights(models)]
        for host, own in zip(taken, _weights(models), strict=True):
            host.copy_(own)
        return cls(taken)

    @torch.no_grad()
    def exchange(self, models: Iterable[nn.Module]) -> None:
        """The model gets these weights and this object the model's, bit for bit.

        Written in place, tensor by tensor, so the device holds one copy of the largest tensor besides the model. What optimizers
        keep of their own, such as the float32 copies of 16-bit weights, stays as it is.
        """
        on_cuda = False
        for host, own in zip(self.tensors, _weights(models), strict=True):
            moved = own.detach().clone()
            own.copy_(host, non_blocking=True)
            host.copy_(moved, non_blocking=True)  # behind the copy above on the same stream
            on_cuda |= own.is_cuda
        if on_cuda:
            torch.cuda.synchronize()

    @contextmanager
    def in_place_of(self, models: list[nn.Module]) -> Iterator[None]:
        """Inside it the model has these weights. Neither train nor save the model there."""
        self.exchange(models)
        try:
            yield
        finally:
            self.exchange(models)


def _weights(models: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters, tied ones once, and buffers: routers keep the bias of their experts in one."""
    for model in models:
        yield from model.parameters()
        yield from (buffer for _, buffer in model.named_buffers())  # `buffers` is something else in megatron's DDP
