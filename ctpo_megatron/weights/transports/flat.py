"""A bucket as one tensor of bytes: few large messages, whatever a model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctpo_megatron.weights.protocol import Bucket


@dataclass(frozen=True, slots=True)
class Flat:
    """The tensors of `bucket`, one behind the other in `data` [n] uint8, in the order of the bucket."""

    bucket: Bucket
    data: Tensor

    @property
    def metadata(self) -> dict[str, list[Any]]:
        """The fields of a request that let SGLang take `data` apart again."""
        return {
            "names": [name for name, _ in self.bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in self.bucket],
            "shapes": [list(tensor.shape) for _, tensor in self.bucket],
        }


def flatten(bucket: Bucket, device: torch.device) -> Flat:
    """The bucket in one piece: not copied where its tensors lie so already, otherwise reordered, the widest number format first.

    SGLang needs each tensor aligned to its own item size.
    """
    whole = _as_it_lies(bucket, device)
    if whole is not None:
        return Flat(bucket, whole)
    ordered = sorted(bucket, key=lambda named: -named[1].element_size())
    data = torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in ordered]).to(device)
    views, start = [], 0
    for name, tensor in ordered:
        views.append((name, data[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)))
        start += tensor.nbytes
    return Flat(views, data)


def _as_it_lies(bucket: Bucket, device: torch.device) -> Tensor | None:
    """The bytes of the bucket, if its tensors are contiguous neighbours in memory in their order, and aligned."""
    first = bucket[0][1]
    storage = first.untyped_storage()
    start = expected = first.storage_offset() * first.element_size()
    for _, tensor in bucket:
        here = tensor.storage_offset() * tensor.element_size()
        same = tensor.device == device and tensor.untyped_storage().data_ptr() == storage.data_ptr()
        if not (same and tensor.is_contiguous() and here == expected and (here - start) % tensor.element_size() == 0):
            return None
        expected += tensor.nbytes
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, start, (expected - start,), (1,))
