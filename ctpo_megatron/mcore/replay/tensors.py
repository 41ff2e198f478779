"""Weights and gradients of a rank under their Hugging Face names: which are not finite, and how large they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctpo_megatron.mcore.groups import current_coords
from ctpo_megatron.mcore.hf.cuts import unpack
from ctpo_megatron.mcore.hf.load import keyed_tensors
from ctpo_megatron.mcore.replay.findings import TensorSeen
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import EMBEDDING_KEY, OUTPUT_KEY, HfTensor, hf_tensors


def weights_seen(models: list[nn.Module], shape: ModelShape, rank: int) -> list[TensorSeen]:
    """The rank's pieces of all weights."""
    return _seen(models, shape, rank, lambda parameter: parameter.detach())


def gradients_seen(models: list[nn.Module], shape: ModelShape, rank: int) -> list[TensorSeen]:
    """The rank's pieces of all gradients after a backward pass, from megatron's buffers.

    With the distributed optimizer a rank's buffer holds sums over ranks in its own share and its own part elsewhere, so what is
    not finite on any rank is seen on that one at least.
    """
    return _seen(models, shape, rank, lambda parameter: getattr(parameter, "main_grad", None))


def _seen(models: list[nn.Module], shape: ModelShape, rank: int, of: Callable[[Tensor], Tensor | None]) -> list[TensorSeen]:
    by_key: dict[str, list[tuple[int, HfTensor]]] = {}
    for number, tensor in enumerate(hf_tensors(shape)):
        by_key.setdefault(tensor.key, []).append((number, tensor))
    if shape.tie_embeddings:  # with pipeline parallelism the last stage holds a copy of the embedding
        by_key[OUTPUT_KEY] = by_key[EMBEDDING_KEY]
    found = []
    for model in models:
        for key, parameter in keyed_tensors(model, shape, current_coords()):
            values = of(parameter)
            if values is None:
                continue
            for number, tensor in by_key[key]:
                piece = unpack(tensor.cut, values, shape)[tensor.part]
                finite = torch.isfinite(piece)
                largest = float(torch.where(finite, piece.abs(), 0.0).amax()) if piece.numel() else 0.0
                found.append(TensorSeen(tensor.name, number, largest, int((~finite).sum()), rank))
    return found
