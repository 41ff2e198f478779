"""The critic's own weights: a linear map of the last hidden states, beside the output matrix and part of the model.

It is whole on every tensor-parallel rank of the last pipeline stage. Megatron's DistributedDataParallel reduces its gradients,
its distributed optimizer holds its moments, and checkpoints have it under `VALUE_HEAD`. What leaves the trainer (`hf/`) goes by
the tensors of the Hugging Face model, of which it is none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.models.tensors import VALUE_HEAD

MARK = "is_value_head"  # on its parameters: what the optimizer tells them by


class ValueHead(nn.Module):
    """Values of hidden states. It begins with zeros, so every value is 0 at first, whatever the layout.

    `trunk`: whether gradients go on into the hidden states; they are parts then, to be summed over the ranks of `group`, as
    `HiddenGPTModel` does it.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, group: dist.ProcessGroup, *, trunk: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.share = 1.0 / group.size() if trunk else 0.0
        for parameter in self.parameters():
            setattr(parameter, MARK, True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [W] of hidden states [W, H], float32."""
        seen = _Share.apply(hidden, self.share) if self.share else hidden.detach()
        return F.linear(seen.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class _Share(torch.autograd.Function):
    """A tensor as it is; of its gradient only a share goes on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: float) -> Tensor:
        ctx.share = share
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.share, None


def add_value_head(model: Any, weights: Literal["head", "shared"], group: dist.ProcessGroup) -> None:
    """Give a GPTModel that ends in hidden states its value head."""
    config = model.config
    model.add_module(VALUE_HEAD, ValueHead(config.hidden_size, config.params_dtype, group, trunk=weights == "shared"))


def value_head(models: list[nn.Module]) -> ValueHead | None:
    """That of a rank's model chunks; None before the last pipeline stage, and where no critic learns."""
    return next((head for model in models if (head := getattr(unwrap(model), VALUE_HEAD, None)) is not None), None)
