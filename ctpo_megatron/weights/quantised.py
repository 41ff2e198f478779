"""Weights on their way to servers that keep them in fp8: between the trainer's stream and the transport.

    trainer's full tensors -> bucket -> [matrices of layers in fp8 blocks, each with its scales] -> digests, delta, transport

So digests are of the bytes that the servers are to hold, and a delta is of what differs in them: a step that moves no number
across a rounding boundary of fp8 sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ctpo_megatron.engine.fp8 import DTYPE, quantise_matrix
from ctpo_megatron.mcore.hf.buffers import BucketMemory
from ctpo_megatron.models.quantised import SCALE_SUFFIX, is_quantised, scale_shape
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.weights.protocol import Bucket


class Quantiser:
    """Puts what servers of a model of `shape` keep in fp8 into that form. `memory` holds its buckets."""

    def __init__(self, shape: ModelShape, memory: BucketMemory) -> None:
        self._names = {tensor.name for tensor in hf_tensors(shape) if is_quantised(tensor)}
        self._memory = memory

    def stream(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """Yields each bucket in the servers' form, and keeps none of them."""
        for bucket in buckets:
            made = [self.bucket(bucket)]
            del bucket  # its memory is wanted for the one after the next
            yield made.pop()

    def bucket(self, bucket: Bucket) -> Bucket:
        """Returns copies of the tensors of `bucket` in the servers' form, one behind the other, widest number format first."""
        if not bucket:  # this rank gave pieces away
            return bucket
        plan = [served for name, tensor in bucket for served in self._served(name, tensor)]
        plan.sort(key=lambda each: -each[1].itemsize)
        places = self._memory.allocate([(dtype, shape) for _, dtype, shape in plan])
        made = {name: place for (name, _, _), place in zip(plan, places, strict=True)}
        for name, tensor in bucket:
            if name in self._names:
                quantise_matrix(tensor, made[name], made[name + SCALE_SUFFIX])
            else:
                made[name].copy_(tensor)
        return list(made.items())

    def _served(self, name: str, tensor: Tensor) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        shape = tuple(tensor.shape)
        if name not in self._names:
            return [(name, tensor.dtype, shape)]
        return [(name, DTYPE, shape), (name + SCALE_SUFFIX, torch.float32, scale_shape(shape))]
