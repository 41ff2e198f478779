"""Which rank sends which tensor of the model: a pure function of what the ranks hold. Needs no megatron.

Of equal replicas (data and context parallelism) the lowest rank counts. Two ways to share out the tensors, by `per_stage`:

    per place   the rank that holds a tensor's first piece sends it: one sender per pipeline stage and expert-parallel place, and
                experts stay where they are
    per stage   the first rank of a pipeline stage sends all of it: few senders, where each of them costs its receivers a
                communicator; experts come to it bucket by bucket

Either way no rank gathers more than its buckets at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.tensors import EMBEDDING_KEY, HfTensor

_OUTPUT = "output"  # the end of the model: final norm and output layer
_LATENT = re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa)\.")


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank has of the model."""

    coords: RankCoords
    layers: tuple[int, ...]  # numbers from 0 over the whole model
    first: bool  # has the embedding
    last: bool  # has the output layer
    memory: str = ""  # the same on ranks that can map each other's memory; empty where that cannot be done

    @property
    def parts(self) -> tuple[int | str, ...]:
        """Its layers and the ends of the model that it has."""
        return (*self.layers, *([EMBEDDING_KEY] if self.first else []), *([_OUTPUT] if self.last else []))


class Holders:
    """Which ranks hold the pieces of each tensor; `everyone` is in the order of ranks."""

    def __init__(self, everyone: Sequence[Holding], num_experts: int) -> None:
        self._tp_size = everyone[0].coords.tp_size
        self._etp_size = everyone[0].coords.etp_size
        self._experts_per_rank = max(1, num_experts // everyone[0].coords.ep_size)
        self._memory = [holding.memory for holding in everyone]
        self._dense: dict[tuple[int | str, int], int] = {}  # (layer or end of the model, tp rank) -> rank
        self._experts: dict[tuple[int | str, int, int], int] = {}  # (layer, ep rank, etp rank) -> rank
        for rank, holding in enumerate(everyone):
            coords = holding.coords
            for part in holding.parts:
                self._dense.setdefault((part, coords.tp_rank), rank)
                self._experts.setdefault((part, coords.ep_rank, coords.etp_rank), rank)

    def of(self, tensor: HfTensor) -> list[int]:
        """Ranks in the order in which their pieces are joined."""
        part = _part(tensor)
        if tensor.expert is not None:
            pieces = 1 if tensor.cut.dim is None else self._etp_size
            return [self._experts[part, tensor.expert // self._experts_per_rank, piece] for piece in range(pieces)]
        return [self._dense[part, piece] for piece in range(1 if tensor.cut.dim is None else self._tp_size)]

    def share_memory(self, rank: int, other: int) -> bool:
        """Whether these two ranks can map each other's memory."""
        return bool(self._memory[rank]) and self._memory[rank] == self._memory[other]

    def sender(self, tensor: HfTensor, *, per_stage: bool = False) -> int:
        """The rank that sends the whole tensor: the one with its first piece, or the first of its pipeline stage."""
        return self._dense[_part(tensor), 0] if per_stage else self.of(tensor)[0]

    def shares(self, tensors: Sequence[HfTensor], *, per_stage: bool = False) -> dict[int, list[HfTensor]]:
        """What each sender sends, senders in the order of ranks: stage by stage, and within a stage place by place."""
        shares: dict[int, list[HfTensor]] = {}
        for tensor in tensors:
            shares.setdefault(self.sender(tensor, per_stage=per_stage), []).append(tensor)
        return dict(sorted(shares.items()))


def _part(tensor: HfTensor) -> int | str:
    """The layer, or the end of the model, that the tensor belongs to."""
    return tensor.layer if tensor.layer is not None else EMBEDDING_KEY if tensor.key == EMBEDDING_KEY else _OUTPUT


def unit_of(name: str) -> str:
    """Tensors of one unit must reach an engine together: it joins them in one parameter, and only if one call brings both.

    SGLang's DeepSeek does so with the two down-projections of latent attention; all other tensors are units of their own.
    """
    return _LATENT.sub(".a_proj.", name)


def make_buckets(tensors: Sequence[HfTensor], element_size: int, bucket_bytes: int) -> list[list[HfTensor]]:
    """Cut the list, in order, into runs of at most `bucket_bytes`; a larger unit gets a bucket of its own."""
    units: dict[str, list[HfTensor]] = {}
    for tensor in tensors:
        units.setdefault(unit_of(tensor.name), []).append(tensor)
    buckets: list[list[HfTensor]] = []
    filled = 0
    for unit in units.values():
        size = sum(nbytes(tensor, element_size) for tensor in unit)
        if not buckets or filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1] += unit
        filled += size
    return buckets


def nbytes(tensor: HfTensor, element_size: int) -> int:
    """Bytes of the whole tensor in a model whose numbers have `element_size` bytes."""
    return math.prod(tensor.shape) * (4 if tensor.precise else element_size)
