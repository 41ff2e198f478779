"""Pieces of Hugging Face tensors joined to Megatron's parameters, and parameters taken apart, as `models.tensors.Cut` says."""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.models.tensors import Cut


def pack(cut: Cut, pieces: list[Tensor], shape: ModelShape) -> Tensor:
    """The parameter that holds one rank's `pieces`, in the order of `HfTensor.part`."""
    if cut.join == "grouped":
        return _pack_qkv(pieces, _heads(shape))
    return torch.cat(pieces) if cut.join == "stacked" else pieces[0]


def unpack(cut: Cut, parameter: Tensor, shape: ModelShape) -> list[Tensor]:
    """Views of the pieces that `parameter` holds; queries, keys and values stay grouped: [groups, rows of a group, ...]."""
    if cut.join == "grouped":
        return _unpack_qkv(parameter, shape, _heads(shape))
    return list(parameter.chunk(2)) if cut.join == "stacked" else [parameter]


def _heads(shape: ModelShape) -> HeadAttention:
    if not isinstance(shape.attention, HeadAttention):
        raise TypeError(f"{shape.family} has latent attention, which has no joined queries, keys and values")
    return shape.attention


def _pack_qkv(pieces: list[Tensor], attention: HeadAttention) -> Tensor:
    """q [G*m*d, ...], k and v [G*d, ...] -> [G*(m+2)*d, ...]: each group of m queries is followed by its key and value."""
    groups = pieces[1].shape[0] // attention.head_dim
    rest = pieces[0].shape[1:]
    return torch.cat([piece.reshape(groups, -1, *rest) for piece in pieces], dim=1).reshape(-1, *rest)


def _unpack_qkv(parameter: Tensor, shape: ModelShape, attention: HeadAttention) -> list[Tensor]:
    """The inverse of `_pack_qkv`: q [G, m*d, ...], k and v [G, d, ...]."""
    dim = attention.head_dim
    queries = shape.num_heads // attention.num_kv_heads
    return list(parameter.view(-1, (queries + 2) * dim, *parameter.shape[1:]).split([queries * dim, dim, dim], dim=1))
