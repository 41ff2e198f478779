"""Values of adapters: drawn by name, cut for a rank, merged into the model's tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ctpo_megatron.checkpoints.hashes import text_hash
from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.model.lora import adapted_pieces, adapter_pairs
from ctpo_megatron.mcore.model.pairs import Pair
from ctpo_megatron.models.tensors import HfTensor


@torch.no_grad()
def draw_adapters(models: list[nn.Module], seed: int) -> None:
    """A as peft draws it, uniform within 1 / sqrt(in), B 0, m the lengths of the model's own rows. Collective.

    The numbers depend on the seed and the tensor's name alone.
    """
    for pair in adapter_pairs(models):
        drawn = torch.Generator().manual_seed(int(text_hash(f"{seed} {pair.adapted.a.name}")[:15], 16))
        bound = 1 / math.sqrt(pair.adapted.a.shape[1])
        whole = torch.empty(pair.adapted.a.shape).uniform_(-bound, bound, generator=drawn)
        pair.a.copy_(own_piece(whole, pair.adapted.a))
        pair.b.zero_()
    for pair, piece in adapted_pieces(models):
        if pair.m is not None:
            pair.m.copy_(pair.lengths(piece))  # so that the sum is W


def own_piece(whole: Tensor, tensor: HfTensor) -> Tensor:
    """This rank's piece of a whole tensor."""
    if tensor.cut.dim is None:
        return whole
    rank, size = current_coords().share(tensor)
    return whole.chunk(size, dim=tensor.cut.dim)[rank]


class Merging:
    """This rank's pairs, to be merged into its pieces of the model's tensors. To make it is collective."""

    def __init__(self, models: list[nn.Module]) -> None:
        self._pairs: dict[str, Pair] = {pair.adapted.base.name: pair for pair in adapter_pairs(models)}
        self._factors = {pair.adapted.base.name: pair.factor(piece) for pair, piece in adapted_pieces(models)}

    def merged(self, tensor: HfTensor, piece: Tensor) -> Tensor:
        """The piece of `tensor` with what its pair adds, rounded once; the piece itself where it has none."""
        pair = self._pairs.get(tensor.name)
        if pair is None:
            return piece
        delta, factor = pair.delta(), self._factors.get(tensor.name)
        delta.add_(piece.reshape(delta.shape))
        if factor is not None:
            delta.mul_(factor[:, None])
        return delta.to(piece.dtype).view(piece.shape)
