"""What the engines should hold once they have loaded what was sent, found from the same tensors that are sent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ctpo_megatron.engine.checksums import EngineDigests, PartDigests
from ctpo_megatron.engine.digest import MODULUS, tensor_digest
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import WeightSyncError, near_miss
from ctpo_megatron.weights.protocol import Bucket


class ExpectedDigests:
    """Adds up the digests of engine tensors from Hugging Face tensors that come in any order, cut into any buckets.

    `dtype`: number format in which the engines keep weights, where it is not that of the tensors that come.
    """

    def __init__(self, layout: EngineLayout, dtype: torch.dtype | None = None) -> None:
        self._layout = layout
        self._dtype = dtype
        self._parts: dict[str, PartDigests] = {}  # by Hugging Face name, in the order of its placements

    def add(self, bucket: Bucket) -> Mapping[str, PartDigests]:
        """The digests of all tensors so far, by name, with those of `bucket` added; they are equal where tensors are equal as
        the engines store them. A tensor that came before is replaced. The tensors may change afterwards.

        Raises WeightSyncError for a tensor that the engine has no place for, or that has another shape.
        """
        for name, tensor in bucket:
            self._parts[name] = self._digests_of(name, tensor)
        return self._parts

    def digests(self) -> EngineDigests:
        """The digests of all engine tensors of which a part has come, each the sum of its parts."""
        ranks: EngineDigests = [{} for _ in range(self._layout.tp)]
        for name, digests in self._parts.items():
            for place, digest in zip(self._layout.placements(name), digests, strict=True):
                mine = ranks[place.rank]
                mine[place.tensor] = (mine.get(place.tensor, 0) + digest) % MODULUS
        return ranks

    def _digests_of(self, name: str, tensor: Tensor) -> PartDigests:
        """The digest of `tensor` at each of its placements; those of a tensor that is not cut are equal, and computed once."""
        if name not in self._layout.names:
            raise WeightSyncError(f"the engine has no place for the tensor {name}.{near_miss(name, self._layout.names)}")
        size = self._layout.size(name)
        if tuple(tensor.shape) != size:
            raise WeightSyncError(f"{name} has the shape {list(tensor.shape)}; the engine expects {list(size)}.")
        matrix = self._as_stored(name, tensor.detach())
        done: dict[tuple[int, ...], int] = {}
        digests = []
        for place in self._layout.placements(name):
            key = (place.rows.start, place.rows.stop, place.columns.start, place.columns.stop, place.row, place.column)
            if key not in done:
                done[key] = tensor_digest(matrix[place.rows, place.columns], place.row, place.column)
            digests.append(done[key])
        return tuple(digests)

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as a matrix in the engine's number format."""
        dtype = torch.float32 if self._layout.is_precise(name) else self._dtype
        return torch.atleast_2d(tensor if dtype is None else tensor.to(dtype))
