"""What a reference policy is on one rank: other weights, or the model without its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ctpo_megatron.mcore.host_weights import HostWeights


class Reference(Protocol):
    """A policy whose log-probs the model can give."""

    def in_place_of(self, models: list[nn.Module]) -> AbstractContextManager[None]:
        """Inside it the model computes as that policy. Neither train nor save the model there."""
        ...


@dataclass(frozen=True)
class BaseModel:
    """The model without its adapters. `weights`: others in its place; None: its own, which takes no memory at all."""

    weights: HostWeights | None = None

    @contextmanager
    def in_place_of(self, models: list[nn.Module]) -> Iterator[None]:
        """Implement `Reference.in_place_of`."""
        from ctpo_megatron.mcore.model.lora import adapters_off

        with adapters_off(models), nullcontext() if self.weights is None else self.weights.in_place_of(models):
            yield
