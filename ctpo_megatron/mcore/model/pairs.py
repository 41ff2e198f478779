"""A and B of one tensor of the model, as megatron's parameters: this rank's pieces, and what megatron has to know of them.

megatron reads marks: over which ranks gradients are added up (`sequence_parallel`, `allreduce`), and what counts in the norm of
all gradients (`tensor_model_parallel`: every rank's; `shared`: a copy, which does not).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from ctpo_megatron.models.adapters import AdaptedTensor
from ctpo_megatron.models.tensors import HfTensor


class Pair(nn.Module):
    """A and B of one tensor of the model: this rank's pieces, B zero and A without values yet.

    `group`: the ranks that cut the tensor, of tensor parallelism, or of expert tensor parallelism.
    """

    def __init__(self, adapted: AdaptedTensor, scale: float, group: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.adapted, self.scale = adapted, scale
        self.a = _parameter(adapted.a, group, dtype)
        self.b = _parameter(adapted.b, group, dtype)

    def parts(self) -> Iterator[tuple[HfTensor, nn.Parameter]]:
        """What is trained, by the names and shapes of the whole tensors."""
        yield self.adapted.a, self.a
        yield self.adapted.b, self.b

    def delta(self) -> Tensor:
        """s B A, float32: what the pair adds to this rank's piece of the tensor."""
        return (self.b.detach().float() @ self.a.detach().float()).mul_(self.scale)


def _parameter(tensor: HfTensor, group: Any, dtype: torch.dtype) -> nn.Parameter:
    dim, ranks = tensor.cut.dim, group.size()
    size = [length // ranks if axis == dim else length for axis, length in enumerate(tensor.shape)]
    parameter: Any = nn.Parameter(torch.zeros(size, dtype=dtype))
    if dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    if tensor.expert is None:
        if dim is None:
            parameter.sequence_parallel = ranks > 1
        return parameter
    parameter.allreduce = False  # but over the ranks that hold the same expert
    if dim is None:  # every rank's counts, as tensor-parallel ranks may hold other experts; but of one and the same the first's
        parameter.tensor_model_parallel = True
        parameter.shared = group.rank() > 0
    return parameter
