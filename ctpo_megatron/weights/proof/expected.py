"""What the engines should hold once they have loaded what was sent, found from the same tensors that are sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ctpo_megatron.engine.checksums import EngineDigests, PartDigests
from ctpo_megatron.engine.digest import MODULUS, Part, tensor_digests
from ctpo_megatron.engine.layout import EngineLayout, Placement
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
            self._check(name, tensor)
        found = iter(tensor_digests(part for name, tensor in bucket for part in self._cut(name, tensor)))
        for name, _ in bucket:
            places = self._layout.placements(name)
            digests = {extent: next(found) for extent in _different(places)}
            self._parts[name] = tuple(digests[_extent(place)] for place in places)
        return self._parts

    def remember(self, parts: Mapping[str, PartDigests]) -> None:
        """Take in digests that an earlier account found, of tensors that have not changed since: they need not come again."""
        self._parts |= parts

    def digests(self) -> EngineDigests:
        """The digests of all engine tensors of which a part has come, each the sum of its parts."""
        ranks: EngineDigests = [{} for _ in range(self._layout.tp)]
        for name, digests in self._parts.items():
            for place, digest in zip(self._layout.placements(name), digests, strict=True):
                mine = ranks[place.rank]
                mine[place.tensor] = (mine.get(place.tensor, 0) + digest) % MODULUS
        return ranks

    def _check(self, name: str, tensor: Tensor) -> None:
        """Raise WeightSyncError for a tensor that the engine does not expect."""
        if name not in self._layout.names:
            raise WeightSyncError(f"the engine has no place for the tensor {name}.{near_miss(name, self._layout.names)}")
        size = self._layout.size(name)
        if tuple(tensor.shape) != size:
            raise WeightSyncError(f"{name} has the shape {list(tensor.shape)}; the engine expects {list(size)}.")

    def _cut(self, name: str, tensor: Tensor) -> Iterator[Part]:
        """The parts of `tensor` at its `_different` placements, in their order."""
        matrix = self._as_stored(name, tensor.detach())
        for place in _different(self._layout.placements(name)).values():
            yield Part(matrix[place.rows, place.columns], place.row, place.column)

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as a matrix in the engine's number format."""
        dtype = torch.float32 if self._layout.is_precise(name) else self._dtype
        return torch.atleast_2d(tensor if dtype is None else tensor.to(dtype))


def _different(places: Sequence[Placement]) -> dict[tuple[int, ...], Placement]:
    """The first placement of each extent. Ranks of the engine that hold the same part are told apart by nothing else."""
    found: dict[tuple[int, ...], Placement] = {}
    for place in places:
        found.setdefault(_extent(place), place)
    return found


def _extent(place: Placement) -> tuple[int, ...]:
    """What a digest depends on besides the tensor: the part's rows and columns, and where it lies in the engine's tensor."""
    return (place.rows.start, place.rows.stop, place.columns.start, place.columns.stop, place.row, place.column)
