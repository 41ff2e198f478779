"""Weights that an optimizer step has moved, and that the ranks gather in the next forward pass (`parallel.overlap_param_gather`).

Each data- and context-parallel rank moves its share of the weights. Megatron (0.16.1, distributed.param_and_grad_buffer)
begins to gather a bucket of them when the one before it has come, and each module waits for its own before its forward pass. Two
things are left to do: what reads weights between two passes has to find them whole, and the output matrix is used without a
forward pass of the module that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def gather_weights(models: Sequence[nn.Module]) -> None:
    """Make the weights of a rank's model chunks whole. Collective; nothing is done where each optimizer step does so."""
    model: Any
    for model in models:
        if _gathers_later(model):
            model.start_param_sync(force_sync=True)


def await_weight(models: Sequence[nn.Module], weight: Tensor) -> None:
    """Wait for one weight that is used without its module's forward pass. Collective where it is not under way yet."""
    model: Any
    for model in models:
        if _gathers_later(model) and weight in model.param_to_bucket_group:
            model.param_to_bucket_group[weight].finish_param_sync()


def _gathers_later(model: Any) -> bool:
    """Whether a chunk, or a bare model that is not trained, leaves gathering to the next forward pass."""
    config = getattr(model, "ddp_config", None)
    return config is not None and config.overlap_param_gather
