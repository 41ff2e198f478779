"""What is trained of one tensor of the model, as parameters: this rank's pieces, and what megatron has to know of them.

With m (DoRA) the tensor is m (W + s B A) / |W + s B A|, row by row. The lengths |.| are constants to the gradient, as in the
paper's section 4.3 and in peft.

megatron reads marks: over which ranks gradients are added up (`sequence_parallel`, `allreduce`), and what counts in the norm of
all gradients (`tensor_model_parallel`: every rank's; `shared`: a copy, which does not).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from ctpo_megatron.models.adapters import AdaptedTensor
from ctpo_megatron.models.tensors import HfTensor


class Pair(nn.Module):
    """A, B and m of one tensor of the model: this rank's pieces, B zero and the others without values yet.

    `group`: the ranks that cut the tensor, of tensor parallelism, or of expert tensor parallelism.
    """

    def __init__(self, adapted: AdaptedTensor, scale: float, group: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.adapted, self.scale, self.group = adapted, scale, group
        self.a = _parameter(adapted.a, group, dtype)
        self.b = _parameter(adapted.b, group, dtype)
        self.m = None if adapted.m is None else _parameter(adapted.m, group, dtype)

    def parts(self) -> Iterator[tuple[HfTensor, nn.Parameter]]:
        """What is trained, by the names and shapes of the whole tensors."""
        yield from zip(self.adapted.parts, (self.a, self.b, *([] if self.m is None else [self.m])), strict=True)

    def delta(self) -> Tensor:
        """s B A, float32: what the pair adds to this rank's piece of the tensor."""
        return (self.b.detach().float() @ self.a.detach().float()).mul_(self.scale)

    def lengths(self, piece: Tensor) -> Tensor:
        """|W + s B A| of each row that this rank has, in the model's number format. `piece`: this rank's of W.

        Collective where columns are cut, as every rank then has a part of each row.
        """
        delta = self.delta()
        squares = delta.add_(piece.reshape(delta.shape)).square_().sum(dim=1)
        if self.adapted.base.cut.dim == 1 and self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt_().to(self.b.dtype)

    def factor(self, piece: Tensor) -> Tensor | None:
        """m / |W + s B A|, float32, by which each row is multiplied; None without m. Collective as `lengths` is."""
        return None if self.m is None else self.m.float() / self.lengths(piece).float()


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
